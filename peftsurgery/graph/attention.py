"""Attention, written out by the exporter, with the heads that share keys and values told apart by an axis.

Models repeat keys and values for every head of a group, which copies all of them at every step. Both forms here read
them where they are: ONNX's own Attention where the opset has it, and products that broadcast over the group.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import onnx_ir as ir
from onnxscript.rewriter import RewriteRule
from onnxscript.rewriter.pattern import ANY_VALUE, OrValue

from peftsurgery.graph.shapes import constant, known

GROUP = 2
"""The axis on which the heads of a group are told apart: (batch, kept head, group, token, width)."""

TIMES, OVER = 0, 1
"""How scores are scaled."""


class Heads(NamedTuple):
    """How many heads there are, how many keys and values are kept for them, and how wide they are."""

    query: int
    kept: int
    width: int


def written_out(op: Any, q: Any, k: Any, v: Any, s: Any, m: Any) -> Any:
    """softmax(q · kᵀ · s + m) · v, each (batch, heads, tokens, width); or with / s, as Falcon has it."""
    return op.MatMul(op.Softmax(op.Add(_scores(op, q, k, s), m), axis=-1), v)


def unmasked(op: Any, q: Any, k: Any, v: Any, s: Any) -> Any:
    """The same without a mask."""
    return op.MatMul(op.Softmax(_scores(op, q, k, s), axis=-1), v)


def _scores(op: Any, q: Any, k: Any, s: Any) -> Any:
    product = op.MatMul(q, op.Transpose(k, perm=[0, 1, 3, 2]))
    return OrValue([op.Mul(product, s), op.Div(product, s)], tag_var="by", tag_values=[TIMES, OVER])


def repeating(op: Any, q: Any, k: Any, v: Any, s: Any, m: Any) -> Any:
    """The same with keys and values of fewer heads, which are repeated for the heads of a group."""
    keys, values = (op.Expand(op.Unsqueeze(one, [GROUP]), ANY_VALUE) for one in (k, v))
    return written_out(op, q, op.Reshape(keys, ANY_VALUE), op.Reshape(values, ANY_VALUE), s, m)


def is_scaled(_: Any, q: ir.Value, k: ir.Value, v: ir.Value, s: ir.Value, **__: Any) -> bool:
    """Whether the scale is one number, and the heads are known."""
    scale = constant(s)
    return scale is not None and scale.size == 1 and _heads(q, k, v) is not None


def is_plain(_: Any, m: ir.Value, **values: Any) -> bool:
    """The same, and the mask is one for all heads."""
    shape = known(m)
    return shape is not None and len(shape) == 4 and shape[1] == 1 and is_scaled(_, **values)


def one_operation(op: Any, q: Any, k: Any, v: Any, s: ir.Value, by: int, m: Any = None, **_: Any) -> Any:
    """Attention(q, k, v, m), which repeats what has fewer heads."""
    scale = constant(s)
    assert scale is not None
    factor = float(scale.item())
    masks = () if m is None else (m,)
    return op.Attention(q, k, v, *masks, scale=factor if by == TIMES else 1 / factor)


def in_groups(op: Any, q: ir.Value, k: ir.Value, v: ir.Value, s: Any, m: Any, by: int, **_: Any) -> Any:
    """The same products, broadcast over an axis for the heads of a group."""
    heads = _heads(q, k, v)
    assert heads is not None
    group = op.Constant(value_ints=[GROUP])
    apart = op.Constant(value_ints=[0, heads.kept, heads.query // heads.kept, -1, heads.width])
    keys = op.Transpose(op.Unsqueeze(k, group), perm=[0, 1, 2, 4, 3])
    scores = (op.Mul if by == TIMES else op.Div)(op.MatMul(op.Reshape(q, apart), keys), s)
    seen = op.Add(scores, op.Unsqueeze(m, group))
    seen.dtype = q.dtype  # a softmax of a half is looked for by its dtype
    weights = op.Softmax(seen, axis=-1)
    together = op.Constant(value_ints=[0, heads.query, -1, heads.width])
    return op.Reshape(op.MatMul(weights, op.Unsqueeze(v, group)), together)


def _heads(q: ir.Value, k: ir.Value, v: ir.Value) -> Heads | None:
    """The heads of (batch, heads, tokens, width); None where they are not known, or do not fit."""
    shapes = [known(value) for value in (q, k, v)]
    sizes = [[n for n in (shape or ())[1::2] if isinstance(n, int)] for shape in shapes]
    if any(shape is None or len(shape) != 4 for shape in shapes) or any(len(two) != 2 for two in sizes):
        return None
    (query, width), (kept, _), last = sizes
    return Heads(query, kept, width) if last == [kept, width] and query % kept == 0 else None


FUSED = (
    *(RewriteRule(form, one_operation, is_plain) for form in (repeating, written_out)),
    RewriteRule(unmasked, one_operation, is_scaled),
)
"""Attention as an operator."""
SHARED = RewriteRule(repeating, in_groups, is_plain)
"""Heads that share keys and values, without the operator."""
