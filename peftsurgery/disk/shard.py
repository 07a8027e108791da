"""One safetensors file: its header, checked before anything believes it, and its tensors, memory-mapped.

The format (https://huggingface.co/docs/safetensors): eight bytes of header length, little-endian; a
JSON header; the tensors' bytes, without holes and without overlaps.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NoReturn, TypeGuard

import torch
from torch import Tensor

from peftsurgery.errors import CheckpointError, DiskError, TruncatedShard

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's words for dtypes that fill whole bytes."""
PREFIX = 8
LONGEST_HEADER = 100_000_000
MOST_AXES = 64


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor in a file.

    Args:
        dtype: the format's word for it, a key of `DTYPES`.
        start, stop: where its bytes lie, counted from the beginning of the file.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


@dataclass(frozen=True, slots=True)
class Shard:
    """One file's tensors, in the order of their bytes."""

    file: Path
    tensors: tuple[Stored, ...]
    metadata: Mapping[str, str]


def read_shard(file: Path) -> Shard:
    """The shard in `file`, from its header alone.

    Raises:
        TruncatedShard: the file is shorter, longer or stranger than its header says.
        CheckpointError: it cannot be read, or holds a dtype that torch has no word for.
    """
    try:
        size = file.stat().st_size
        header, offset = _header(file, size)
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read: {error.strerror}. Check the file and its rights."
        ) from error
    metadata = _metadata(file, header.pop("__metadata__", {}))
    tensors = [_stored(file, name, said, offset) for name, said in header.items()]
    tensors.sort(key=lambda stored: (stored.start, stored.stop))
    _check_extents(file, tensors, offset, size)
    return Shard(file, tuple(tensors), metadata)


def load(stored: Stored) -> Tensor:
    """The tensor, mapped copy-on-write: its pages are read when they are used, and the file never changes.

    The memory goes back with the last reference to the tensor.

    Raises:
        TruncatedShard: the file has shrunk or gone since its header was read.
    """
    dtype = stored.torch_dtype
    if stored.nbytes == 0:
        return torch.empty(stored.shape, dtype=dtype)
    first = stored.start - stored.start % mmap.ALLOCATIONGRANULARITY
    try:
        with stored.file.open("rb") as handle:
            pages = mmap.mmap(handle.fileno(), stored.stop - first, offset=first, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise TruncatedShard(
            f"{stored.file} changed while it was being read ({error}). Run again."
        ) from error
    raw = torch.frombuffer(pages, dtype=torch.uint8, offset=stored.start - first)
    aligned = raw if stored.start % dtype.itemsize == 0 else raw.clone()
    return aligned.view(dtype).reshape(stored.shape)


def fetch(stored: Stored) -> Tensor:
    """The tensor, read into memory of its own.

    Raises:
        TruncatedShard: the file has shrunk or gone since its header was read.
        DiskError: the disk does not give it.
    """
    room = torch.empty(stored.shape, dtype=stored.torch_dtype)
    read_into(stored.file, stored.start, room.view(-1).view(torch.uint8).numpy().data)
    return room


def read_into(file: Path, start: int, room: memoryview) -> None:
    """Fill `room` with the bytes of `file` from `start` on.

    Raises:
        TruncatedShard: the file is shorter than it was when its header was read, or gone.
        DiskError: the disk does not give it.
    """
    try:
        with file.open("rb", buffering=0) as handle:
            while room:
                taken = os.preadv(handle.fileno(), [room], start)
                if not taken:
                    raise FileNotFoundError("it has shrunk")
                room, start = room[taken:], start + taken
    except FileNotFoundError as error:
        raise TruncatedShard(f"{file} changed while it was being read ({error}). Run again.") from error
    except OSError as error:
        raise DiskError(f"{file} cannot be read: {error.strerror or error}", "Check the disk") from error


def _header(file: Path, size: int) -> tuple[dict[str, object], int]:
    """The JSON object at the beginning of the file, and where the tensors' bytes begin."""
    with file.open("rb") as handle:
        prefix = handle.read(PREFIX)
        length = int.from_bytes(prefix, "little")
        if prefix == b"version ":
            _strange(file, "is a Git LFS pointer and not the file itself", "Fetch it: `git lfs pull`")
        if len(prefix) < PREFIX or length > size - PREFIX:
            _strange(file, f"is {size} bytes long and announces a header of {length}")
        if length > LONGEST_HEADER:
            _strange(
                file, f"announces a header of {length} bytes, and {LONGEST_HEADER} are the most there may be"
            )
        raw = handle.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        _strange(file, f"has a header that is no JSON ({error!s:.80})")
    if not isinstance(header, dict):
        _strange(file, "has a header that is no JSON object")
    return header, PREFIX + length


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _metadata(file: Path, said: object) -> dict[str, str]:
    if not isinstance(said, dict) or not all(isinstance(value, str) for value in said.values()):
        _strange(file, "has metadata that are not strings")
    return said


def _stored(file: Path, name: str, said: object, offset: int) -> Stored:
    entry = said if isinstance(said, dict) else {}
    dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not (isinstance(dtype, str) and _counts(shape) and _counts(span) and len(span) == 2):
        _strange(file, f"describes {name!r} in words that are not the format's")
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{file} stores {name!r} as {dtype!r}, which peftsurgery cannot read. "
            "Take the model in a plain dtype, e.g. bfloat16."
        )
    if len(shape) > MOST_AXES or prod(shape) * DTYPES[dtype].itemsize != span[1] - span[0]:
        _strange(file, f"gives {name!r} {span[1] - span[0]} bytes, which is not {dtype} × {shape!s:.80}")
    return Stored(name, file, dtype, tuple(shape), offset + span[0], offset + span[1])


def _counts(value: object) -> TypeGuard[list[int]]:
    """Whether `value` is a list of natural numbers."""
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 1 << 63 for number in value)


def _check_extents(file: Path, tensors: Iterable[Stored], offset: int, size: int) -> None:
    reached = offset
    for stored in tensors:
        if stored.start != reached:
            what = "overlaps the tensor before it" if stored.start < reached else "leaves a hole before it"
            _strange(file, f"has a header in which {stored.name!r} {what}")
        reached = stored.stop
    if reached != size:
        _strange(file, f"is {size} bytes long and announces {reached}")


def _strange(file: Path, fact: str, remedy: str = "Download or save it again") -> NoReturn:
    raise TruncatedShard(f"{file} {fact}. {remedy}; nothing was changed.")
