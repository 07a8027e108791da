"""What a graph says of its values before it runs."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import onnx_ir as ir


def known(value: ir.Value) -> tuple[int | str, ...] | None:
    """The value's shape, an axis of no fixed size by its name; None where something is not known of it."""
    if value.shape is None:
        return None
    axes = tuple(axis if isinstance(axis, int) else axis.value for axis in value.shape)
    return tuple(axis for axis in axes if axis is not None) if None not in axes else None


def constant(value: ir.Value) -> npt.NDArray[Any] | None:
    """What the value always is, where that is said in the graph."""
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()
