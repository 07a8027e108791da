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
from onnxscript.rewriter.rules.fusion._rms_normalization import RmsNormFusion
from onnxscript.rewriter.rules.fusion._rotary_embedding import (
    PartialRotaryEmbedding23Fusion,
    RotaryEmbedding23Fusion,
)

STANDING = ("Attention", "RMSNormalization", "RotaryEmbedding", "LayerNormalization", "Gelu")
"""The operators that stand for many."""


class _Norm(RmsNormFusion):
    """onnxscript's, where input and weight have one dtype: not every kernel has two."""

    def check(self, *given: Any, **values: Any) -> Any:
        if values["x"].dtype != values["scale"].dtype:
            return MatchResult().fail("The weight has another dtype than the input.")
        return super().check(*given, **values)


class _Rotary(RotaryEmbedding23Fusion):
    """onnxscript's, where every row has angles of its own: ONNX Runtime refuses angles of one row for many."""

    def check(self, *given: Any, **values: Any) -> Any:
        x, angles = values["x"].shape, values["freqs"].shape
        if x is None or angles is None or x[0] != angles[0]:
            return MatchResult().fail("The angles are not those of every row.")
        return super().check(*given, **values)


class _NarrowRotary(_Rotary):
    """The same of a half, whose angles' cosines and sines are rounded to it."""

    def pattern(  # type: ignore[override]
        self,
        op: Any,
        x: Any,
        freqs: Any,
        start1: Any,
        end1: Any,
        start2: Any,
        end2: Any,
        one1: Any,
        one2: Any,
        to: Any,
    ) -> Any:
        angles = op.Concat(freqs, freqs, axis=-1)
        cos = op.Unsqueeze(op.Cast(op.Cos(angles), to=to), one1)
        sin = op.Unsqueeze(op.Cast(op.Sin(angles), to=to), one2)
        left, right = op.Slice(x, start1, end1, [3], [1]), op.Slice(x, start2, end2, [3], [1])
        return x * cos + op.Concat(op.Neg(right), left, axis=-1) * sin

    def rewrite(self, op: Any, x: Any, freqs: Any, **words: Any) -> Any:
        to = words["to"]
        cos, sin = (op.Cast(of(freqs), to=to.as_int()) for of in (op.Cos, op.Sin))
        return op.RotaryEmbedding(x, cos, sin, interleaved=0, num_heads=x.shape[1])


ALL: Sequence[Sequence[RewriteRule]] = (
    [_Norm.rule(f"norm {order}", mul_order=order) for order in (True, False)],  # type: ignore[no-untyped-call]
    [_Rotary.rule(), _NarrowRotary.rule()],  # type: ignore[no-untyped-call]
    [PartialRotaryEmbedding23Fusion.rule()],
)
"""The rules, in their order: a rotation of a part is seen after that of the whole part."""


def counts(model: ir.Model) -> Mapping[str, int]:
    """How many of each operator that stands for many a graph has."""
    found = Counter(node.op_type for node in model.graph if not node.domain)
    return {op: found[op] for op in STANDING if found[op]}
