"""Graphs and their weights, in files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from peftsurgery.errors import CheckpointError, ExportError, MissingShard, TruncatedShard, UnsafePath

if TYPE_CHECKING:
    import onnx_ir as ir

INLINE = 2_000_000_000
"""Bytes of weights that one file may hold; protobuf stops at 2³¹, graph and names included."""


def load(path: Path) -> ir.Model:
    """The graph in `path`; external weights stay in their files until they are read.

    Raises:
        CheckpointError: no ONNX model can be read there.
        UnsafePath: external weights would be read from outside the model's directory.
        MissingShard, TruncatedShard: the file of its external weights is missing or too short.
    """
    import onnx_ir as ir
    from google.protobuf.message import DecodeError

    try:
        model = ir.load(path)
    except (OSError, DecodeError) as error:
        raise CheckpointError(
            f"{path} is no ONNX model that can be read: {error}. Name an `.onnx` file."
        ) from error
    if not len(model.graph):
        raise CheckpointError(f"{path} holds no ONNX graph. Name an `.onnx` file.")
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            _check(value.const_value, path.resolve().parent)
    return model


def save(model: ir.Model, directory: Path, name: str = "model.onnx", *, inline: int = INLINE) -> list[Path]:
    """Write the graph into an existing directory, and say which files hold it; checked and synced.

    Weights of `inline` bytes or more go to one file `<name>_data` beside it, a tensor at a time.

    Raises:
        ExportError: what was written is not valid ONNX.
        OSError: the disk refuses; the caller throws the directory away.
    """
    import onnx
    import onnx_ir as ir

    path, data = directory / name, directory / f"{name}_data"
    apart = nbytes(model) >= inline
    ir.save(model, path, external_data=data.name if apart else None)
    try:
        onnx.checker.check_model(os.fspath(path))
    except onnx.checker.ValidationError as error:
        raise ExportError(f"{name} would be invalid ONNX: {error}. Report it; nothing was kept.") from error
    files = [path, data] if apart else [path]
    for file in (*files, directory):
        _sync(file)
    return files


def nbytes(model: ir.Model) -> int:
    """How many bytes its initializers hold."""
    values = model.graph.initializers.values()
    return sum(value.const_value.nbytes for value in values if value.const_value is not None)


def _check(tensor: ir.ExternalTensor, root: Path) -> None:
    place = Path(tensor.location)
    if place.is_absolute() or ".." in place.parts or not (root / place).resolve().is_relative_to(root):
        raise UnsafePath(
            f"{tensor.name!r} lies at {str(place)!r}, outside the model's directory. "
            "Put the weights beside the model; nothing was read."
        )
    if not (root / place).is_file():
        raise MissingShard(
            f"{str(place)!r}, which holds {tensor.name!r}, is not beside the model. Copy it there."
        )
    end = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
    if (root / place).stat().st_size < end:
        raise TruncatedShard(f"{str(place)!r} ends before {tensor.name!r} does. Copy it again, whole.")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
