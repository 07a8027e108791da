"""A checkpoint that is going to be written: which file holds what, and the stream that fills them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from peftsurgery.disk.checkpoint import INDEX, Checkpoint, Stored
from peftsurgery.disk.writer import Entry, write_json, write_safetensors
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
    parts = [part for shard in checkpoint.shards if (part := _part(checkpoint.path, shard, rename, dtype)).entries]
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
        (directory / part.file).parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(directory / part.file, part.entries, coming, part.metadata)
    if (extra := next(coming, None)) is not None:  # it also lets the stream say what it has missed
        raise CheckpointError(f"{extra[0]!r} came and was not announced. Nothing was kept.")
    nbytes = sum(entry.nbytes for entry in entries)
    files = [part.file for part in parts]
    if index is not None:
        write_json(directory / INDEX, _index(parts, index, nbytes))
        files.append(INDEX)
    return Written(tuple(files), nbytes, len(entries))
