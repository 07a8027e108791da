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
from onnxscript.rewriter.pattern import MatchResult, OrValue
from onnxscript.rewriter.rules.fusion._rotary_embedding import (
    PartialRotaryEmbedding23Fusion,
    RotaryEmbedding23Fusion,
)

from peftsurgery.graph.shapes import constant

STANDING = ("Attention", "RMSNormalization", "RotaryEmbedding", "LayerNormalization", "Gelu")
"""The operators that stand for many."""


def scaled(op: Any, x: Any, scale: Any, epsilon: Any, to: Any) -> Any:
    """x / √(mean(x²) + ε) · scale, x in float32, and the quotient cast before it is scaled where that is narrower."""
    return op.Mul(_quotient(op, x, epsilon, to), scale)


def scaling(op: Any, x: Any, scale: Any, epsilon: Any, to: Any) -> Any:
    """The same product in the other order."""
    return op.Mul(scale, _quotient(op, x, epsilon, to))


def _quotient(op: Any, x: Any, epsilon: Any, to: Any) -> Any:
    mean = op.ReduceMean(op.Pow(x, 2.0), [-1], keepdims=1, noop_with_empty_axes=0)
    quotient = op.Mul(x, op.Reciprocal(op.Sqrt(op.Add(mean, epsilon))))
    return OrValue([op.Cast(quotient, to=to), quotient])


def is_norm(_: Any, x: ir.Value, epsilon: ir.Value, **__: Any) -> bool:
    value = constant(epsilon)
    return x.dtype == ir.DataType.FLOAT and value is not None and value.size == 1


def norm(op: Any, x: ir.Value, scale: ir.Value, epsilon: ir.Value, **_: Any) -> Any:
    """RMSNormalization of one dtype, for ONNX Runtime's CPU takes no two.

    That of the weight where x was cast from it. Otherwise float32: Gemma's weights, 1 + w, are exact there, and a sum
    of T5 that is in float32, because it overflows float16, stays in it.
    """
    value = constant(epsilon)
    assert value is not None
    words = {"axis": -1, "epsilon": float(value.item()), "stash_type": ir.DataType.FLOAT}
    own = _before_cast(x)
    if own.dtype == scale.dtype:
        return op.RMSNormalization(own, scale, **words)
    if scale.dtype == x.dtype:
        return op.RMSNormalization(x, scale, **words)
    wide = op.RMSNormalization(x, op.Cast(scale, to=ir.DataType.FLOAT), **words)
    return op.Cast(wide, to=scale.dtype)


def _before_cast(x: ir.Value) -> ir.Value:
    node = x.producer()
    before = node.inputs[0] if node is not None and node.op_type == "Cast" else None
    return x if before is None else before


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
    [RewriteRule(form, norm, is_norm) for form in (scaled, scaling)],
    [_Rotary.rule(), _NarrowRotary.rule()],  # type: ignore[no-untyped-call]
    [PartialRotaryEmbedding23Fusion.rule()],
)
"""The rules, in their order: a rotation of a part is seen after that of the whole part."""


def counts(model: ir.Model) -> Mapping[str, int]:
    """How many of each operator that stands for many a graph has."""
    found = Counter(node.op_type for node in model.graph if not node.domain)
    return {op: found[op] for op in STANDING if found[op]}
