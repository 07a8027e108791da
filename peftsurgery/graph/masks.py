"""What transformers asks of a padding mask token by token, asked of the whole mask at once.

It looks mask[b, k] up for every row b and every key k, and lets query q see k where q ≥ 0 besides. Both are true of
causal and sliding masks too, which ask more. What is the same for every query is then broadcast and never written out.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import RewriteRule
from onnxscript.rewriter.pattern import ANY_VALUE

from peftsurgery.graph.shapes import constant, known

ROWS, QUERIES, KEYS = 0, 2, 3
"""The axes of a mask: (batch, 1, query, key)."""


def itself(op: Any, x: Any, **_: Any) -> Any:
    return op.Identity(x)


def masked(op: Any, x: Any, mask: Any) -> Any:
    """x + Where(true, 0, y) = x."""
    return op.Add(x, mask, _outputs=["scores"])


def hides_nothing(_: Any, x: ir.Value, mask: ir.Value, scores: ir.Value) -> bool:
    node = mask.producer()
    if node is None or node.op_type != "Where" or known(x) is None or known(x) != known(scores):
        return False
    truth, chosen = (None if value is None else _always(value) for value in node.inputs[:2])
    return truth is not None and chosen is not None and bool(truth.all()) and not chosen.any()


def _always(value: ir.Value) -> Any:
    """What a constant, or one that is expanded, holds; None of what is not constant."""
    node = value.producer()
    if node is not None and node.op_type == "Expand" and node.inputs[0] is not None:
        return _always(node.inputs[0])
    return constant(value)


def looked_up(op: Any, mask: Any, b: Any, k: Any) -> Any:
    """GatherND(mask, [b, k]) for b, k = 0, 1, 2, … = the mask, with axes for heads and queries.

    A mask is as long as what is counted: the tokens seen and the new ones, as the graph's inputs say.
    """
    rows = op.Unsqueeze(op.Expand(b, ANY_VALUE), ANY_VALUE)
    keys = op.Unsqueeze(op.Expand(k, ANY_VALUE), ANY_VALUE)
    return op.GatherND(mask, op.Concat(rows, keys, axis=-1), batch_dims=0)


def is_whole(_: Any, mask: ir.Value, b: ir.Value, k: ir.Value) -> bool:
    shape = known(mask)
    return shape is not None and len(shape) == 2 and counts(b, ROWS) and counts(k, KEYS)


def whole(op: Any, mask: Any, **_: Any) -> Any:
    return op.Unsqueeze(mask, op.Constant(value_ints=[1, QUERIES]))


def of_queries(op: Any, q: Any, least: Any, x: Any) -> Any:
    """And(q ≥ 0, x) = x for q = 0, 1, 2, …, where only scores are added to what comes of it, which broadcasts."""
    return op.And(op.GreaterOrEqual(q, least), x, _outputs=["seen"])


def is_every_query(_: Any, q: ir.Value, least: ir.Value, x: ir.Value, seen: ir.Value) -> bool:
    bound = constant(least)
    return bound is not None and bool((bound <= 0).all()) and counts(q, QUERIES) and _only_added(seen)


def counts(value: ir.Value, axis: int) -> bool:
    """Whether it is 0, 1, 2, … along one axis of four."""
    shape, node = known(value), value.producer()
    if shape is None or [at for at, size in enumerate(shape) if size != 1] != [axis] or len(shape) != 4:
        return False
    while node is not None and node.op_type == "Unsqueeze":
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    if node is None or node.op_type != "Range":
        return False
    start, _, step = (None if one is None else constant(one) for one in node.inputs)
    return start is not None and step is not None and (int(start), int(step)) == (0, 1)


def _only_added(mask: ir.Value) -> bool:
    """Whether it chooses between two constants, and scores are added to these and nothing else is done."""
    choices = [node for node, _ in mask.uses()]
    users = [user for node in choices for user, _ in node.outputs[0].uses()]
    chosen = all(node.op_type == "Where" and _constants(node) for node in choices)
    return chosen and bool(users) and all(user.op_type == "Add" for user in users)


def _constants(choice: ir.Node) -> bool:
    return all(value is not None and constant(value) is not None for value in choice.inputs[1:])


IDLE = (RewriteRule(masked, itself, hides_nothing),)
"""A mask that hides nothing, as a model of images has."""
LOOKUPS = (RewriteRule(looked_up, whole, is_whole),)
"""A mask that is read as a whole."""
BROADCASTS = (RewriteRule(of_queries, itself, is_every_query),)
"""A mask that is the same for every query; Attention wants it written out."""
