"""Safetensors files, written tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from peftsurgery.disk.durable import created, put, writing
from peftsurgery.disk.shard import DTYPES
from peftsurgery.errors import CheckpointError

WORDS = {dtype: word for word, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor that a safetensors file will hold."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def write_safetensors(
    file: Path, entries: Sequence[Entry], tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]
) -> None:
    """Write a new safetensors file from its announced `entries`, tensor by tensor as they come by.

    Exactly one tensor per entry is taken from `tensors`, in the same order; none is held.

    Raises:
        CheckpointError: the stream is not what was announced, or the file cannot be written.
    """
    coming = iter(tensors)
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    with created(file) as descriptor:
        end = put(file, descriptor, _header(entries, metadata), 0)
        for entry in entries:
            end = put(file, descriptor, _raw(entry, next(coming, None)), end)


def _header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    said: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    reached = 0
    for entry in entries:
        span = [reached, reached + entry.nbytes]
        said[entry.name] = {"dtype": WORDS[entry.dtype], "shape": list(entry.shape), "data_offsets": span}
        reached = span[1]
    text = json.dumps(said, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _raw(entry: Entry, coming: tuple[str, Tensor] | None) -> memoryview:
    """The bytes of the tensor that came, which must be the one announced; a view where it can be."""
    if coming is None or Entry(coming[0], coming[1].dtype, tuple(coming[1].shape)) != entry:
        came = "nothing" if coming is None else f"{coming[0]!r} as {coming[1].dtype} {tuple(coming[1].shape)}"
        raise CheckpointError(
            f"{entry.name!r} was announced as {entry.dtype} {entry.shape} and {came} came. Nothing was kept."
        )
    return coming[1].detach().cpu().reshape(-1).view(torch.uint8).numpy().data
