"""Initializers of a model that was traced without its weights: read where they are stored, or when they are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from peftsurgery.errors import NotReferable
from peftsurgery.graph.passes import as_ir, swaps

if TYPE_CHECKING:
    import onnx_ir as ir

CONTRIB = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""


@dataclass(frozen=True, slots=True)
class Span:
    """Where the bytes of a tensor lie.

    Args:
        file: the path of the file below the graph's directory (see `move`).
        start: the first byte, counted from the beginning of the file.
        nbytes: how many there are.
    """

    file: str
    start: int
    nbytes: int


Held = Span | Callable[[], Tensor]
"""A place that a graph reads a weight at, or what gives the weight when the graph is written."""


def point(model: ir.Model, held: Mapping[str, Held]) -> None:
    """Give every initializer that was traced without its bytes a place or a giver; the others stay as they are.

    Raises:
        NotReferable: one of them lies nowhere.
    """
    import onnx_ir as ir

    for name, value in model.graph.initializers.items():
        own = value.const_value
        if not isinstance(own, ir.Tensor) or not isinstance(own.raw, FakeTensor):
            continue
        if name not in held:
            raise NotReferable(f"The graph reads {name!r}, which no file of the checkpoint holds")
        value.const_value = _pointed(name, held[name], own)


def _pointed(name: str, held: Held, own: ir.TensorProtocol) -> ir.TensorProtocol:
    import onnx_ir as ir

    shape = ir.Shape(own.shape.numpy())
    if isinstance(held, Span):
        place = held.file, held.start, held.nbytes
        return ir.ExternalTensor(*place, own.dtype, shape=shape, name=name)
    return ir.LazyTensor(lambda: as_ir(held(), name), own.dtype, shape, name=name)


def move(model: ir.Model, directory: Path) -> None:
    """Let the files of its external initializers lie in `directory`."""
    import onnx_ir as ir

    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value.base_dir = directory


def files(model: ir.Model) -> list[str]:
    """The files that its external initializers lie in."""
    import onnx_ir as ir

    held = (value.const_value for value in model.graph.initializers.values())
    return sorted({str(tensor.location) for tensor in held if isinstance(tensor, ir.ExternalTensor)})


def nbytes(model: ir.Model) -> int:
    """How many bytes its external initializers hold."""
    import onnx_ir as ir

    held = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in held if isinstance(tensor, ir.ExternalTensor))


def read_as_stored(model: ir.Model) -> None:
    """`MatMul(x, Transpose(W))` of a W in a file becomes `FusedMatMul(x, W, transB=1)`.

    A Transpose would make ONNX Runtime write every weight again, in memory, whenever it loads the graph.
    FusedMatMul is an operator of ONNX Runtime alone and takes a left side of any rank; ONNX's own Gemm takes
    matrices only, and would need two Reshapes and the shape arithmetic for them at every linear map.
    """
    import onnx_ir as ir

    for value in list(model.graph.initializers.values()):
        if isinstance(value.const_value, ir.ExternalTensor):
            for node in [node for node, _ in value.uses() if swaps(node)]:
                _fuse(model, value, node)


def _fuse(model: ir.Model, weight: ir.Value, transpose: ir.Node) -> None:
    turned = transpose.outputs[0]
    for node, index in list(turned.uses()):
        if node.op_type == "MatMul" and index == 1 and not node.domain:
            _replace(model, node, weight)
    if not turned.uses() and not turned.is_graph_output():
        model.graph.remove(transpose, safe=True)


def _replace(model: ir.Model, node: ir.Node, weight: ir.Value) -> None:
    import onnx_ir as ir

    fused = ir.node(
        "FusedMatMul", [node.inputs[0], weight], {"transB": 1}, domain=CONTRIB, name=node.name, num_outputs=1
    )
    old, new = node.outputs[0], fused.outputs[0]
    new.name, new.shape, new.type = old.name, old.shape, old.type
    model.graph.insert_before(node, fused)
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
    model.graph.opset_imports[CONTRIB] = 1
