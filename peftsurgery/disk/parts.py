"""A checkpoint that is going to be written: which file holds what, and the stream that fills them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from peftsurgery.disk.checkpoint import INDEX, Checkpoint, Shard, Stored, load
from peftsurgery.disk.durable import write_json
from peftsurgery.disk.writer import Entry, write_safetensors
from peftsurgery.errors import CheckpointError
from peftsurgery.events import Event, Listener


@dataclass(frozen=True, slots=True)
class Part:
    """One file of it: the tensors that stay from the base, then those that are new."""

    file: str
    sources: tuple[Stored, ...]
    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Written:
    """What lies on the disk now.

    Args:
        files: the weight files, and the index where there is one.
        nbytes: the size of all tensors.
    """

    files: tuple[str, ...]
    nbytes: int
    num_tensors: int


def outline(
    checkpoint: Checkpoint,
    rename: Callable[[str], str | None],
    *,
    dtype: torch.dtype | None = None,
    added: Sequence[Entry] = (),
) -> tuple[Part, ...]:
    """The files of `checkpoint` again, in the same order, under other names.

    Args:
        rename: the new name of a tensor; None leaves it out, and a file without tensors too.
        dtype: of every floating tensor; its own by default.
        added: new tensors, at the end of the last file.

    Raises:
        CheckpointError: two tensors would get the same name.
    """
    parts = [
        part for shard in checkpoint.shards if (part := _part(checkpoint.path, shard, rename, dtype)).entries
    ]
    if added and parts:
        parts[-1] = replace(parts[-1], entries=(*parts[-1].entries, *added))
    _check_unique(entry.name for part in parts for entry in part.entries)
    return tuple(parts)


def write_parts(
    directory: Path,
    parts: Sequence[Part],
    tensors: Iterable[tuple[str, Tensor]],
    index: Mapping[str, object] | None,
    listen: Listener,
) -> Written:
    """Fill the files of `parts` from one stream, and write their index where the base has one.

    Raises:
        CheckpointError: the stream is not what was announced, or a file cannot be written.
    """
    entries = [entry for part in parts for entry in part.entries]
    coming = _told(tensors, len(entries), listen)
    for part in parts:
        write_safetensors(directory / part.file, part.entries, coming, part.metadata)
    if (extra := next(coming, None)) is not None:  # it also lets the stream say what it has missed
        raise CheckpointError(f"{extra[0]!r} came and was not announced. Nothing was kept.")
    nbytes = sum(entry.nbytes for entry in entries)
    files = [part.file for part in parts]
    if index is not None:
        write_json(directory / INDEX, _index(parts, index, nbytes))
        files.append(INDEX)
    return Written(tuple(files), nbytes, len(entries))


def staying(parts: Iterable[Part]) -> Iterator[tuple[str, Tensor]]:
    """What stays from the base, one tensor at a time, under its new name."""
    for part in parts:
        for entry, source in zip(part.entries, part.sources, strict=False):
            yield entry.name, load(source)


def _part(root: Path, shard: Shard, rename: Callable[[str], str | None], dtype: torch.dtype | None) -> Part:
    kept = [(name, stored) for stored in shard.tensors if (name := rename(stored.name)) is not None]
    entries = tuple(
        Entry(name, written_dtype(stored.torch_dtype, dtype), stored.shape) for name, stored in kept
    )
    file = shard.file.relative_to(root).as_posix()
    return Part(file, tuple(stored for _, stored in kept), entries, {**shard.metadata, "format": "pt"})


def written_dtype(dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """What a tensor of `dtype` is written as: only floating ones change."""
    return wanted if wanted is not None and dtype.is_floating_point else dtype


def _check_unique(names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise CheckpointError(
                f"Two tensors of the base would both be called {name!r}. Nothing was written."
            )
        seen.add(name)


def _told(
    tensors: Iterable[tuple[str, Tensor]], total: int, listen: Listener
) -> Iterator[tuple[str, Tensor]]:
    for done, (name, tensor) in enumerate(tensors, 1):
        listen(Event("write", name, done, total, tensor.nbytes))
        yield name, tensor


def _index(parts: Sequence[Part], metadata: Mapping[str, object], nbytes: int) -> dict[str, object]:
    said = {**metadata, "total_size": nbytes}
    if "total_parameters" in metadata:
        said["total_parameters"] = sum(entry.numel for part in parts for entry in part.entries)
    places = {entry.name: part.file for part in parts for entry in part.entries}
    return {"metadata": said, "weight_map": dict(sorted(places.items()))}
