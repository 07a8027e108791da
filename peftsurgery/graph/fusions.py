"""Norms and rotary embeddings as the operators that ONNX has for them from opset 23 on: fewer, larger kernels.

On a GPU every node is a launch, so these are for CUDA; on a CPU they buy nothing. The patterns are onnxscript's. What
they do not see stays as it is: norms that add one to their weight (Gemma), rotations of pairs side by side (GPT-J).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter.pattern import MatchResult
from onnxscript.rewriter.rules.fusion._rms_normalization import rms_normalization_rules
from onnxscript.rewriter.rules.fusion._rotary_embedding import (
    PartialRotaryEmbedding23Fusion,
    RotaryEmbedding23Fusion,
)

OPSET = 24
"""The first opset whose Attention, RMSNormalization and RotaryEmbedding ONNX Runtime runs on CPUs and on CUDA."""
FUSED = ("Attention", "RMSNormalization", "RotaryEmbedding", "LayerNormalization", "Gelu")
"""The operators that stand for many."""


class _Rotary(RotaryEmbedding23Fusion):
    """onnxscript's, where every row has angles of its own: ONNX Runtime refuses angles of one row for many."""

    def check(self, op: Any, x: Any, freqs: Any, **words: Any) -> MatchResult:
        if (
            freqs is None
            or freqs.shape is None
            or x is None
            or x.shape is None
            or freqs.shape[0] != x.shape[0]
        ):
            return MatchResult().fail("The angles are not those of every row.")
        return super().check(op, x=x, freqs=freqs, **words)


ALL = (tuple(rms_normalization_rules), (_Rotary.rule(),), (PartialRotaryEmbedding23Fusion.rule(),))
"""The rules, in their order: a rotation of a part is seen after that of the whole part."""


def counts(model: ir.Model) -> Mapping[str, int]:
    """How many of each operator that stands for many a graph has."""
    found = Counter(node.op_type for node in model.graph if not node.domain)
    return {op: found[op] for op in FUSED if found[op]}
