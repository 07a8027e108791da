"""Graphs and their weights, in files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from peftsurgery.errors import CheckpointError, ExportError, MissingShard, TruncatedShard, UnsafePath
from peftsurgery.graph.passes import as_ir, as_torch
from peftsurgery.graph.signature import RECORDED

if TYPE_CHECKING:
    import onnx
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


def save(model: ir.Model, directory: Path, name: str = "model.onnx", *, inline: bool = False) -> list[Path]:
    """Write the graph into an existing directory, and say which files hold it; checked and synced.

    Weights go to one file `<name>.data` beside it, a tensor at a time; or, `inline`, into the graph itself. Where some
    lie in files of the directory already (`reference`), they stay there, and the others go into the graph.

    Raises:
        ExportError: what was written is not valid ONNX, or is too large for one file.
        OSError: the disk refuses; the caller throws the directory away.
    """
    import onnx
    import onnx_ir as ir

    path, data = directory / name, directory / f"{name}.data"
    linked = any(_lies_in(value.const_value, directory) for value in model.graph.initializers.values())
    apart = not (inline or linked)
    if not apart:
        _check_small(model, directory, name)
    _take_in(model, directory)
    ir.save(model, path, external_data=data.name if apart else None)
    try:
        onnx.checker.check_model(_unlinked(path) if linked else os.fspath(path))
    except onnx.checker.ValidationError as error:
        raise ExportError(f"{name} would be invalid ONNX: {error}. Report it; nothing was kept.") from error
    files = [file for file in (path, data) if file.exists()]
    for file in (*files, directory):
        _sync(file)
    return files


def _check_small(model: ir.Model, directory: Path, name: str) -> None:
    """Refuse a graph whose own weights, those that lie in no file of the directory, are too large for protobuf."""
    tensors = [value.const_value for value in model.graph.initializers.values()]
    held = sum(t.nbytes for t in tensors if t is not None and not _lies_in(t, directory))
    if held >= INLINE:
        raise ExportError(
            f"{name} would hold {held / 1e9:.1f} GB of weights, and one ONNX file takes less than 2 GB. Export with "
            "`--weights copy`; nothing was written."
        )


def note(file: Path, facts: Mapping[str, str]) -> None:
    """Add facts to the metadata of a graph that is written already; none of its bytes is read or moved.

    Protobuf messages of one kind, one after the other, are one message.
    """
    import onnx

    entries = [onnx.StringStringEntryProto(key=RECORDED + name, value=fact) for name, fact in facts.items()]
    with file.open("ab") as handle:
        handle.write(onnx.ModelProto(metadata_props=entries).SerializeToString())
    _sync(file)


def _lies_in(tensor: ir.TensorProtocol | None, directory: Path) -> bool:
    import onnx_ir as ir

    return isinstance(tensor, ir.ExternalTensor) and Path(tensor.base_dir).resolve() == directory.resolve()


def _take_in(model: ir.Model, directory: Path) -> None:
    """Read what lies in files of another directory, each when it is written."""
    import onnx_ir as ir

    for value in model.graph.initializers.values():
        held = value.const_value
        if isinstance(held, ir.ExternalTensor) and not _lies_in(held, directory):
            value.const_value = ir.LazyTensor(partial(_read, held), held.dtype, held.shape, name=value.name)


def _read(held: ir.ExternalTensor) -> ir.TensorProtocol:
    return as_ir(as_torch(held), held.name)


def _unlinked(path: Path) -> onnx.ModelProto:
    """The graph with its external weights as inputs: the checker refuses the hard links that hold them."""
    import onnx

    proto = onnx.load(path, load_external_data=False)
    held = list(proto.graph.initializer)
    del proto.graph.initializer[:]
    for tensor in held:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            port = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            proto.graph.input.append(port)
        else:
            proto.graph.initializer.append(tensor)
    return proto


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
