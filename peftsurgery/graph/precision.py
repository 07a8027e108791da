"""What half precision needs of a graph: masks that stay finite, and float32 where a device has no bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from peftsurgery.graph.passes import as_ir, as_torch

if TYPE_CHECKING:
    import onnx_ir as ir

LEAST = -65504.0
"""The least number of float16."""
MASKED = LEAST / 2
"""What a hidden token's score gets instead: with the score added it is still a number, and its softmax is still 0."""
FILLS = frozenset({"Where", "Mul"})
"""What puts the mask's number where a token is hidden."""


def finite(model: ir.Model) -> None:
    """Let float16 masks hide tokens with half of the least number.

    The least one with a score of -16 added is minus infinity. A row that sees no token, as padding on the left has,
    would then be NaN, and NaN keys and values spoil every row after it, for 0 × NaN is NaN.
    """
    import torch

    for name, value, tensor in _scalars(model):
        if float(as_torch(tensor)) > LEAST or not {node.op_type for node, _ in value.uses()} <= FILLS:
            continue
        new = as_ir(torch.full_like(as_torch(tensor), MASKED), name)
        producer = value.producer()
        value.const_value = new
        if producer is not None:
            _set(producer, new)


def _scalars(model: ir.Model) -> Iterator[tuple[str | None, ir.Value, ir.TensorProtocol]]:
    """The float16 constants of one element, in initializers and in Constant nodes."""
    import onnx_ir as ir

    made = [node.outputs[0] for node in model.graph.all_nodes() if node.op_type == "Constant"]
    for value in [*model.graph.initializers.values(), *made]:
        tensor = value.const_value or _held(value)
        if tensor is not None and tensor.size == 1 and tensor.dtype == ir.DataType.FLOAT16:
            yield value.name, value, tensor


def _held(value: ir.Value) -> ir.TensorProtocol | None:
    producer = value.producer()
    kept = producer.attributes.get("value") if producer is not None else None
    return None if kept is None else kept.as_tensor()


def _set(node: ir.Node, tensor: ir.TensorProtocol) -> None:
    import onnx_ir as ir

    node.attributes["value"] = ir.AttrTensor("value", tensor)


def is_bfloat16(path: Path) -> bool:
    """Whether any weight of the graph is bfloat16; none is read."""
    import onnx_ir as ir

    held = (value.const_value for value in ir.load(path).graph.initializers.values())
    return any(tensor is not None and tensor.dtype == ir.DataType.BFLOAT16 for tensor in held)


def widened(path: Path) -> bytes:
    """The graph of `path` with float32 in the place of bfloat16, its weights still read as they are stored.

    Every bfloat16 weight goes through a Cast, so external ones stay in their files; the operations and their order
    are the same. It is for devices that have no bfloat16 operations, such as ONNX Runtime's CPU.
    """
    import onnx_ir as ir

    model = ir.load(path)
    first = next(iter(model.graph), None)
    for body in (model.graph, *model.graph.subgraphs()):
        for value in [*body.inputs, *body.outputs]:
            _widen(value)
    for node in model.graph.all_nodes():
        for output in node.outputs:
            _widen(output)
        _retarget(node)
    for value in list(model.graph.initializers.values()):
        if value.const_value is not None and value.const_value.dtype == ir.DataType.BFLOAT16 and first:
            _cast(model, value, first)
    made: bytes = ir.to_proto(model).SerializeToString()
    return made


def _widen(value: ir.Value) -> None:
    import onnx_ir as ir

    if value.dtype == ir.DataType.BFLOAT16:
        value.dtype = ir.DataType.FLOAT


def _retarget(node: ir.Node) -> None:
    """Casts to bfloat16 and constants of it become those of float32."""
    import onnx_ir as ir

    to = node.attributes.get("to")
    if to is not None and to.as_int() == ir.DataType.BFLOAT16:
        node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
    held = node.attributes.get("value")
    if held is not None and held.type == ir.AttributeType.TENSOR:
        tensor = held.as_tensor()
        if tensor.dtype == ir.DataType.BFLOAT16:
            _set(node, as_ir(as_torch(tensor).float(), tensor.name))


def _cast(model: ir.Model, weight: ir.Value, first: ir.Node) -> None:
    import onnx_ir as ir

    users = [(node, index) for node, index in weight.uses()]
    cast = ir.node("Cast", [weight], {"to": int(ir.DataType.FLOAT)}, name=f"{weight.name}/widened")
    cast.outputs[0].name = f"{weight.name}/float32"
    model.graph.insert_before(first, cast)
    for node, index in users:
        node.replace_input_with(index, cast.outputs[0])
