"""Initializers of a model that was traced without its weights: read where they are stored, or when they are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from peftsurgery.errors import NotReferable
from peftsurgery.graph.passes import as_ir

if TYPE_CHECKING:
    import onnx_ir as ir


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
