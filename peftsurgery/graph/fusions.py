"""Norms and rotary embeddings as the operators that ONNX has for them from opset 23 on: fewer, larger kernels.

On a GPU every node is a launch, so these are for CUDA; on a CPU they buy nothing. The patterns are onnxscript's. What
they do not see stays as it is: rotations of pairs side by side (GPT-J), norms of another formula.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import RewriteRule
from onnxscript.rewriter.pattern import MatchResult
from onnxscript.rewriter.rules.fusion._rms_normalization import rms_normalization_rules
from onnxscript.rewriter.rules.fusion._rotary_embedding import (
    PartialRotaryEmbedding23Fusion,
    RotaryEmbedding23Fusion,
)

STANDING = ("Attention", "RMSNormalization", "RotaryEmbedding", "LayerNormalization", "Gelu")
"""The operators that stand for many."""


class _Rotary(RotaryEmbedding23Fusion):
    """onnxscript's, where every row has angles of its own: ONNX Runtime refuses angles of one row for many."""

    def check(self, *given: Any, **values: Any) -> Any:
        x, angles = values["x"].shape, values["freqs"].shape
        if x is None or angles is None or x[0] != angles[0]:
            return MatchResult().fail("The angles are not those of every row.")
        return super().check(*given, **values)


ALL: Sequence[Sequence[RewriteRule]] = (
    rms_normalization_rules,
    [_Rotary.rule()],  # type: ignore[no-untyped-call]
    [PartialRotaryEmbedding23Fusion.rule()],
)
"""The rules, in their order: a rotation of a part is seen after that of the whole part."""


def counts(model: ir.Model) -> Mapping[str, int]:
    """How many of each operator that stands for many a graph has."""
    found = Counter(node.op_type for node in model.graph if not node.domain)
    return {op: found[op] for op in STANDING if found[op]}
