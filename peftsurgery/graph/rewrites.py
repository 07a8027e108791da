"""Rewrites of what the exporter spells out, into what ONNX Runtime computes with fewer and cheaper operations.

A rule is a pattern, what must be so, and what takes its place; the docstring of the pattern is the formula. They go by
the shapes that the exporter knows, read no weight, and leave every initializer under its name.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, IdentityEliminationPass
from onnxscript.rewriter import RewriteRule, RewriteRuleSet
from onnxscript.rewriter.rules import common

from peftsurgery.graph import attention, fusions, masks
from peftsurgery.graph.export import OPSET
from peftsurgery.graph.masks import itself
from peftsurgery.graph.shapes import constant, known

HALVES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


def apply(model: ir.Model, *, fuse: bool = False) -> None:
    """Rewrite what is idle, and then what is made of the rest; attention before masks may broadcast.

    Args:
        fuse: norms and rotations too, into operators that stand for many.
    """
    has_attention = model.graph.opset_imports[""] >= OPSET
    fused = [attention.FUSED] if has_attention else []
    larger = fusions.ALL if fuse else ()
    CommonSubexpressionEliminationPass()(model)  # a pattern wants one Cast of what a norm reads twice
    for rules in ((*IDLE, *masks.IDLE), masks.LOOKUPS, *fused, masks.BROADCASTS, *larger, FORMULAS, ISLANDS):
        RewriteRuleSet(rules).apply_to_model(model)
        IdentityEliminationPass()(model)


def turned_twice(op: Any, x: Any) -> Any:
    """Transpose(Transpose(x)) = x, of a stack of matrices: attention is known by its transposes."""
    return op.Transpose(op.Transpose(x, perm=[0, 2, 1]), perm=[0, 2, 1])


def expand(op: Any, x: Any, shape: Any) -> Any:
    """Expand(x, the shape of x) = x."""
    return op.Expand(x, shape, _outputs=["wide"])


def expands_nothing(_: Any, x: ir.Value, wide: ir.Value, **__: Any) -> bool:
    return known(x) is not None and known(x) == known(wide)


def there_and_back(op: Any, x: Any, wide: Any, own: Any) -> Any:
    """Cast(Cast(x, a wider dtype), the dtype of x) = x: what the exporter makes of a softmax in float32 of a half."""
    return op.Cast(op.Cast(x, to=wide), to=own)


def is_wider(_: Any, x: ir.Value, wide: ir.Attr, own: ir.Attr, **__: Any) -> bool:
    return x.dtype in HALVES and wide.as_int() == ir.DataType.FLOAT and own.as_int() == x.dtype


def softmax(op: Any, x: Any) -> Any:
    """softmax(x) of a half, in float32 and rounded once."""
    return op.Softmax(x, _allow_other_attributes=True, _outputs=["weights"])


def is_half(_: Any, x: ir.Value, **__: Any) -> bool:
    return x.dtype in HALVES


def island(op: Any, x: ir.Value, weights: ir.Value) -> Any:
    wide = op.Softmax(op.Cast(x, to=ir.DataType.FLOAT), **_attributes(weights))
    return op.Cast(wide, to=x.dtype)


def _attributes(made: ir.Value) -> dict[str, Any]:
    """Those of the node that made it."""
    node = made.producer()
    return {} if node is None else {name: said.value for name, said in node.attributes.items()}


def both(op: Any, truth: Any, x: Any) -> Any:
    """And(true, x) = x."""
    return op.And(truth, x, _outputs=["wide"])


def is_true(_: Any, x: ir.Value, truth: ir.Value, wide: ir.Value) -> bool:
    value = constant(truth)
    return value is not None and bool(value.all()) and expands_nothing(_, x, wide)


def view(op: Any, x: Any, shape: Any) -> Any:
    """Reshape(x, a computed shape) = Reshape(x, [0, …, -1, …]), with 0 for an axis that x has there."""
    return op.Reshape(x, shape, _outputs=["seen"])


def is_computed(_: Any, x: ir.Value, shape: ir.Value, seen: ir.Value) -> bool:
    return constant(shape) is None and _axes(x, seen).count(-1) == int(-1 in _axes(x, seen))


def constant_view(op: Any, x: ir.Value, seen: ir.Value, **_: Any) -> Any:
    return op.Reshape(x, op.Constant(value_ints=_axes(x, seen)))


def _axes(x: ir.Value, seen: ir.Value) -> list[int]:
    """The axes of a view of x, -1 for one that x does not tell; twice -1 where there is nothing to go by."""
    before, after = known(x), known(seen)
    if before is None or after is None or 0 in after:
        return [-1, -1]
    padded = [*before, *[None] * len(after)]
    return [
        now if isinstance(now, int) else 0 if now == then else -1
        for now, then in zip(after, padded, strict=False)
    ]


def largest(op: Any, x: Any) -> Any:
    """Where the largest of some integers is: CUDA finds it among floats alone, and a double holds them exactly."""
    return op.ArgMax(x, _allow_other_attributes=True, _outputs=["place"])


def is_whole(_: Any, x: ir.Value, **__: Any) -> bool:
    return x.dtype == ir.DataType.INT32


def of_doubles(op: Any, x: Any, place: ir.Value) -> Any:
    return op.ArgMax(op.Cast(x, to=ir.DataType.DOUBLE), **_attributes(place))


def times_rsqrt(op: Any, x: Any, v: Any) -> Any:
    """x · (1 / √v) = x / √v, the form of RMSNorm that ONNX Runtime knows as one operation."""
    return op.Mul(x, op.Reciprocal(op.Sqrt(v)))


def over_sqrt(op: Any, x: Any, v: Any) -> Any:
    return op.Div(x, op.Sqrt(v))


def rotated(op: Any, x: Any, sin: Any) -> Any:
    """[-x₂, x₁] · sin = [x₂, x₁] · [-sin₁, sin₂]: the sign goes into the sines, once for all layers."""
    upper = op.Slice(x, _allow_other_inputs=True, _outputs=["upper"])
    lower = op.Slice(x, _allow_other_inputs=True, _outputs=["lower"])
    return op.Mul(op.Concat(op.Neg(upper), lower, axis=-1), sin)


def is_halved(_: Any, x: ir.Value, lower: ir.Value, upper: ir.Value, **__: Any) -> bool:
    width = _width(x)
    return bool(width) and (_cut(lower), _cut(upper)) == ((0, width // 2), (width // 2, width))


def signed_sines(op: Any, x: ir.Value, sin: ir.Value, **_: Any) -> Any:
    half = _width(x) // 2
    lower, upper = op.Split(x, op.Constant(value_ints=[half, half]), axis=-1, _outputs=2)
    signs = op.Constant(value=ir.tensor([-1.0] * half + [1.0] * half, dtype=sin.dtype or ir.DataType.FLOAT))
    return op.Mul(op.Concat(upper, lower, axis=-1), op.Mul(sin, signs))


def _width(x: ir.Value) -> int:
    """The length of the last axis; 0 where it is not known, or odd."""
    shape = known(x)
    last = shape[-1] if shape else 0
    return last if isinstance(last, int) and last % 2 == 0 else 0


def _cut(part: ir.Value) -> tuple[int, int] | None:
    """Where a Slice of the last axis begins and ends; None where it is another, or not said."""
    node = part.producer()
    whole = None if node is None or node.inputs[0] is None else known(node.inputs[0])
    if node is None or whole is None or not isinstance(whole[-1], int):
        return None
    said = [None if value is None else constant(value) for value in node.inputs[1:]]
    numbers = [int(value.item()) for value in said if value is not None and value.size == 1]
    if len(numbers) not in (3, 4) or len(numbers) < len(said):
        return None
    start, end, axis, *step = numbers
    return (start, min(end, whole[-1])) if axis in (-1, len(whole) - 1) and step in ([], [1]) else None


IDLE = (
    common.collapse_slice_rule,
    common.no_op_transpose_rule,
    *common.add_0_rule.commute(),
    *common.mul_by_1_rule.commute(),
    common.squeeze_reshape_1d_rule,
    RewriteRule(expand, itself, expands_nothing),
    RewriteRule(turned_twice, itself),
    RewriteRule(there_and_back, itself, is_wider),
    *RewriteRule(both, itself, is_true).commute(),
)
"""What gives back what it was given."""
FORMULAS = (
    RewriteRule(largest, of_doubles, is_whole),
    *RewriteRule(times_rsqrt, over_sqrt).commute(),
    *RewriteRule(rotated, signed_sines, is_halved).commute(),
    attention.SHARED,
    RewriteRule(view, constant_view, is_computed),
)
"""What can be said in fewer words."""
ISLANDS = (RewriteRule(softmax, island, is_half),)
"""What half precision computes in float32; after the others, which know a softmax by its bare form."""
