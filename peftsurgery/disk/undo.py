"""The undo file of a merge in place: a safetensors file of the bytes that the merge overwrites.

Its tensors have the model's names, dtypes and shapes. Its metadata say which files they come from, what those
files are (their size and the SHA-256 of their header), the SHA-256 of the original bytes, and what the model's
`peftsurgery.json` said. The header is written last, so that a file with a header is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from peftsurgery.disk.durable import discard, opened, put, rename
from peftsurgery.disk.identity import identify
from peftsurgery.disk.jobs import jobs
from peftsurgery.disk.output import Output, past_cache, reserve
from peftsurgery.disk.passing import carry_out
from peftsurgery.disk.pieces import Piece
from peftsurgery.disk.shard import Stored, read_shard
from peftsurgery.disk.writer import THREADS, header
from peftsurgery.errors import CheckpointError

FORMAT = "peftsurgery undo 1"
BLOCK = 8 << 20
"""Bytes that are moved at a time."""


@dataclass(frozen=True, slots=True)
class Patched:
    """One file that is patched.

    Args:
        file: its name in the model's directory.
        size: in bytes.
        header: the SHA-256 of its header.
        tensors: what is patched in it, in the order of their bytes.
        before: the SHA-256 of the original bytes of these tensors, one after the other.
    """

    file: str
    size: int
    header: str
    tensors: tuple[str, ...]
    before: str


@dataclass(frozen=True, slots=True)
class Undo:
    """What an undo file holds.

    Args:
        identity: the SHA-256 of its header, and so of all that the header says.
        provenance: what the model's `peftsurgery.json` said; None where there was none.
        originals: the tensors, by name.
    """

    file: Path
    identity: str
    patched: tuple[Patched, ...]
    provenance: str | None
    originals: Mapping[str, Stored]


def write_undo(
    file: Path, root: Path, tensors: Mapping[Path, Sequence[Stored]], provenance: str | None
) -> Undo:
    """Keep the present bytes of `tensors`, by the file of the model in `root` that holds them.

    The undo file is on the disk when this returns; what fails leaves none.

    Raises:
        CheckpointError: a file cannot be read or written.
    """
    temporary = file.with_name(f".{file.name}.partial")
    entries = [Piece(s.name, s.torch_dtype, s, ()) for held in tensors.values() for s in held]
    blank = [_described(root, place, held) for place, held in tensors.items()]
    discard(temporary)
    try:
        with opened(temporary, new=True) as descriptor, past_cache(temporary) as direct:
            start = len(header(entries, _metadata(blank, provenance)))
            before = _keep(Output(file, descriptor, direct), entries, start, tensors.values())
            patched = [replace(one, before=digest) for one, digest in zip(blank, before, strict=True)]
            put(file, descriptor, header(entries, _metadata(patched, provenance)), 0)
    except BaseException:
        discard(temporary)
        raise
    try:
        rename(temporary, file)
    except BaseException:
        discard(temporary)
        discard(file)
        raise
    return read_undo(file)


def read_undo(file: Path) -> Undo:
    """The undo file, from its header.

    Raises:
        CheckpointError: it is none, or not whole.
    """
    if not file.is_file():
        raise CheckpointError(f"{file} is not there. Give the undo file that the merge in place wrote.")
    shard = read_shard(file)
    try:
        if shard.metadata.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        said = json.loads(shard.metadata["patched"])
        patched = tuple(Patched(**{**one, "tensors": tuple(one["tensors"])}) for one in said)
        provenance = json.loads(shard.metadata["provenance"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file} is no undo file of a merge in place ({error!s:.80}). Give the one that the merge wrote; "
            "nothing was changed."
        ) from error
    return Undo(file, identify(file).header_sha256, patched, provenance, {s.name: s for s in shard.tensors})


def check_undo(undo: Undo) -> None:
    """Refuse an undo file whose bytes are not the ones that it was written with.

    Raises:
        CheckpointError: it is damaged.
    """
    for one in undo.patched:
        held = [undo.originals[name] for name in one.tensors if name in undo.originals]
        if len(held) != len(one.tensors) or digest(held) != one.before:
            raise CheckpointError(
                f"{undo.file} is damaged: what it keeps of {one.file} has another SHA-256 than it says. "
                "Take a copy of it, or download the model again; nothing was changed."
            )


def digest(tensors: Iterable[Stored]) -> str:
    """The SHA-256 of the tensors' bytes, one after the other."""
    found = hashlib.sha256()
    for stored in tensors:
        for block in blocks(stored):
            found.update(block)
    return found.hexdigest()


def blocks(stored: Stored) -> Iterator[bytes]:
    """The bytes of a tensor, read a few at a time.

    Raises:
        CheckpointError: they cannot be read, or are not all there.
    """
    try:
        with stored.file.open("rb", buffering=0) as handle:
            for start in range(stored.start, stored.stop, BLOCK):
                block = os.pread(handle.fileno(), min(BLOCK, stored.stop - start), start)
                if len(block) != min(BLOCK, stored.stop - start):
                    raise CheckpointError(f"{stored.file} shrank while it was being read. Run again.")
                yield block
    except OSError as error:
        raise CheckpointError(
            f"{stored.name!r} cannot be read from {stored.file}: {error.strerror}. Check the disk."
        ) from error


def _described(root: Path, place: Path, held: Sequence[Stored]) -> Patched:
    name, found = place.relative_to(root).as_posix(), identify(place)
    return Patched(name, found.size, found.header_sha256, tuple(s.name for s in held), "0" * 64)


def _metadata(patched: Sequence[Patched], provenance: str | None) -> dict[str, str]:
    said = json.dumps([asdict(one) for one in patched])
    return {"format": FORMAT, "patched": said, "provenance": json.dumps(provenance)}


def _keep(
    out: Output, entries: Sequence[Piece], start: int, tensors: Collection[Sequence[Stored]]
) -> list[str]:
    """Copy the tensors to `start` and after; meanwhile the SHA-256 of those of each file."""
    reserve(out, start + sum(piece.nbytes for piece in entries))
    with ThreadPoolExecutor(1) as beside:
        digests = [beside.submit(digest, held) for held in tensors]
        try:
            carry_out(jobs(entries, start, "cpu"), out, lambda job, ran: None, threads=THREADS)
        except BaseException:
            beside.shutdown(wait=False, cancel_futures=True)
            raise
        return [found.result() for found in digests]
