"""Graphs and their weights, in files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from peftsurgery.errors import CheckpointError, ExportError, MissingShard, TruncatedShard, UnsafePath
from peftsurgery.graph.passes import as_ir, as_torch

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


def share(model: ir.Model, source: Path, directory: Path) -> int:
    """Let the graph, which will be saved into `directory`, read the weights that `source` has from its file.

    What has the same name and the same bytes there is not written again: its file is hard-linked into
    `directory`. The rest, a prompt or a head, stays in the graph. How many bytes are shared comes back.
    (ONNX Runtime reads hard links; onnx's and onnx_ir's own loaders refuse them.)

    Raises:
        CheckpointError: `source` keeps no weights in a file beside it, or none of these, or cannot be linked.
    """
    import onnx_ir as ir

    there = {n: v.const_value for n, v in load(source).graph.initializers.items()}
    files: set[str] = set()
    shared = 0
    for name, value in model.graph.initializers.items():
        twin, own = there.get(name), value.const_value
        if not isinstance(twin, ir.ExternalTensor) or own is None or not _equal(own, twin, source.parent):
            continue
        value.const_value = ir.ExternalTensor(
            twin.location,
            twin.offset,
            twin.nbytes,
            own.dtype,
            shape=twin.shape,
            name=name,
            base_dir=directory,
        )
        files.add(str(twin.location))
        shared += own.nbytes
    if not files:
        raise CheckpointError(
            f"{source} has none of these weights in a file beside it. Name an export of the same base that was "
            "written with `--external-weights`; nothing was written."
        )
    for file in files:
        _link(source.parent / file, directory / file)
    return shared


def _equal(own: ir.TensorProtocol, twin: ir.ExternalTensor, root: Path) -> bool:
    if own.dtype != twin.dtype or list(own.shape) != list(twin.shape) or own.nbytes != twin.nbytes:
        return False
    with (root / twin.location).open("rb") as file:
        file.seek(twin.offset or 0)
        return file.read(twin.nbytes) == own.tobytes()


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        raise CheckpointError(
            f"{source} cannot be shared with {target.parent}: {error.strerror or error}. "
            "Export to the same file system, or leave out `--share-weights`; nothing was written."
        ) from error


def save(model: ir.Model, directory: Path, name: str = "model.onnx", *, inline: int = INLINE) -> list[Path]:
    """Write the graph into an existing directory, and say which files hold it; checked and synced.

    Weights of `inline` bytes or more go to one file `<name>_data` beside it, a tensor at a time; those that
    lie in a file of the directory already (`share`, `reference`) stay there, and no others do.

    Raises:
        ExportError: what was written is not valid ONNX.
        OSError: the disk refuses; the caller throws the directory away.
    """
    import onnx
    import onnx_ir as ir

    path, data = directory / name, directory / f"{name}_data"
    linked = any(_lies_in(value.const_value, directory) for value in model.graph.initializers.values())
    apart = nbytes(model) >= inline and not linked
    if not apart:
        _take_in(model, directory)
    ir.save(model, path, external_data=data.name if apart else None)
    try:
        onnx.checker.check_model(_unlinked(path) if linked else os.fspath(path))
    except onnx.checker.ValidationError as error:
        raise ExportError(f"{name} would be invalid ONNX: {error}. Report it; nothing was kept.") from error
    files = [path, data] if apart else [path]
    for file in (*files, directory):
        _sync(file)
    return files


def check_readable(model: ir.Model) -> None:
    """Refuse a graph whose weights onnx does not read, before one of them is needed.

    Raises:
        CheckpointError: a file of external weights is a hard link.
    """
    import onnx_ir as ir

    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and Path(tensor.path).stat().st_nlink > 1:
            raise CheckpointError(
                f"{str(tensor.location)!r}, which holds {tensor.name!r}, is a hard link, which onnx refuses to read. "
                "Merge into the model's directory instead (`peftsurgery merge MODEL ADAPTER -o OUT`) and export "
                "that; nothing was written."
            )


def _lies_in(tensor: ir.TensorProtocol | None, directory: Path) -> bool:
    import onnx_ir as ir

    return isinstance(tensor, ir.ExternalTensor) and Path(tensor.base_dir).resolve() == directory.resolve()


def _take_in(model: ir.Model, directory: Path) -> None:
    """Hold in the graph itself what lies in files of another directory."""
    import onnx_ir as ir

    for value in model.graph.initializers.values():
        held = value.const_value
        if isinstance(held, ir.ExternalTensor) and not _lies_in(held, directory):
            value.const_value = as_ir(as_torch(held), value.name)


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
