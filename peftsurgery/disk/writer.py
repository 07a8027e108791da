"""One safetensors file, written: a pure function of a task that can be sent to another process and run twice."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from peftsurgery.disk import halfway
from peftsurgery.disk.durable import discard, link, writing
from peftsurgery.disk.jobs import Job, Make, Ran, jobs, summed
from peftsurgery.disk.output import Output, output, put, reserve, sharing
from peftsurgery.disk.passing import carry_out
from peftsurgery.disk.pieces import BLOCK, HELD, Piece
from peftsurgery.disk.progress import Progress, tell_all
from peftsurgery.disk.rooms import OWN, PAGE
from peftsurgery.disk.shard import DTYPES, PREFIX, read_into, read_shard
from peftsurgery.errors import CheckpointError
from peftsurgery.events import Listener, ignore
from peftsurgery.tally import Tally
from peftsurgery.workers import workers

WORDS = {dtype: word for word, dtype in DTYPES.items()}
THREADS = min(8, os.cpu_count() or 1)
"""One that computes for every core, beside the one that writes; each holds two blocks and a few tiles."""


@dataclass(frozen=True, slots=True, eq=False)
class ShardTask:
    """One file to write.

    Args:
        pieces: its tensors, in the order of their bytes.
        mode: the permissions of the file; what the user's mask leaves by default.
        device: where folding is computed.
        measure: every how many-th tile is measured, to tell how far its tensor moved; 0 for none.
        threads: how many work on it; they do not change a bit of it.
        twin: a file that holds these tensors already, whose bytes are shared where the file system can.
    """

    file: Path
    pieces: tuple[Piece, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    mode: int | None = None
    device: str = "cpu"
    measure: int = 0
    threads: int = THREADS
    twin: Path | None = None

    @property
    def nbytes(self) -> int:
        """The size of its tensors."""
        return sum(piece.nbytes for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class ShardDone:
    """What was written.

    Args:
        nbytes: the size of the file.
        tallies: how far every touched tensor moved, where that was asked for.
        shared: how it has its twin's bytes, `reflink` or `hard link`; empty where it was written.
        unshared: why its twin's bytes could not be shared.
        sums: for each job in turn what `is_written` knows its bytes by; None for bytes that are the base's own.
    """

    file: Path
    nbytes: int
    tallies: Mapping[str, Tally]
    shared: str = ""
    unshared: str = ""
    sums: tuple[int | None, ...] = ()


def write_shard(task: ShardTask, listen: Listener = ignore) -> ShardDone:
    """Write one safetensors file; under its name it is whole, and on the disk.

    What is left alone is moved as bytes, the rest is read, folded and written in blocks, by several threads at a
    time. Running it again writes the same file again, but for what is there and noted of one that was interrupted
    (`halfway`). Of a twin nothing is written where its bytes can be shared.

    Raises:
        CheckpointError: a file cannot be read or written.
        NonFiniteWeight: folding gave a NaN or an infinity.
    """
    how, why = _shared(task)
    if how:
        tell_all(task.pieces, listen)
        return ShardDone(task.file, task.file.stat().st_size, {}, shared=how)
    with output(task.file, task.mode, keep=bool(halfway.parts(task.file))) as out:
        head = header(task.pieces, task.metadata, _skew(task.pieces, out))
        size = len(head) + task.nbytes
        reserve(out, size)
        put(out, 0, torch.frombuffer(bytearray(head), dtype=torch.uint8))
        so_far = _filled(task, out, len(head), listen)
    halfway.forget(task.file)
    tallies = so_far.tallies
    whole = {
        piece.name: tallies[piece.name].of(piece.numel) for piece in task.pieces if piece.name in tallies
    }
    return ShardDone(task.file, size, whole, unshared=why, sums=tuple(so_far.sums))


def _so_far(task: ShardTask, todo: Sequence[Job], start: int, out: Output) -> halfway.Halfway:
    """What of the file, whose tensors begin at `start`, is there as it was noted; nothing where a byte is another.

    Where pages are shared the first one was just tried with, and shared bytes have no sums that would tell.
    """
    known = halfway.found(task.file, start)
    noted, spoilt = todo[: len(known.sums)], out.shares and start < PAGE
    if spoilt or not noted:
        return halfway.Halfway(task.file, start)
    agreed = _agree_all(halfway.unfinished(task.file), noted, known.sums, task.threads)
    return known if agreed else halfway.Halfway(task.file, start)


def _filled(task: ShardTask, out: Output, start: int, listen: Listener) -> halfway.Halfway:
    """Write its tensors from `start` on, but for what is there of them."""
    todo = jobs(task.pieces, start, task.device)
    so_far, progress = _so_far(task, todo, start, out), Progress(task.pieces, start, listen)
    there = len(so_far.sums)
    for job in todo[:there]:
        progress.wrote(job.start, job.nbytes)

    def done(job: Job, ran: Ran) -> None:
        so_far.sums.append(ran.sum)
        if task.measure and isinstance(job, Make) and job.piece.touched:
            so_far.tallies[job.piece.name] += ran.tally
        so_far.wrote(out.plain, job.nbytes)
        progress.wrote(job.start, job.nbytes)

    carry_out(todo[there:], out, done, threads=task.threads, device=task.device, measure=task.measure)
    HELD.clear()
    return so_far


def _shared(task: ShardTask) -> tuple[str, str]:
    """How the file has its twin's bytes now; or why it has not."""
    if task.twin is None:
        return "", ""
    discard(task.file)
    how, why = link(task.twin, task.file)
    if how == "reflink" and task.mode is not None:
        with writing(task.file):
            task.file.chmod(task.mode)
    return how, why


def is_written(task: ShardTask, done: ShardDone) -> bool:
    """Whether the file of a task is there as `write_shard` once wrote it: its header, and the sums of its bytes.

    A file that cannot be read is not.
    """
    try:
        return _is_headed(task, done) and _are_summed(task, done.nbytes - task.nbytes, done.sums)
    except CheckpointError:
        return False


def _is_headed(task: ShardTask, done: ShardDone) -> bool:
    shard = read_shard(task.file)
    held = [(stored.name, stored.torch_dtype, stored.shape) for stored in shard.tensors]
    named = [(piece.name, piece.dtype, piece.shape) for piece in task.pieces]
    size = task.file.stat().st_size
    return (size, held, dict(shard.metadata)) == (done.nbytes, named, dict(task.metadata))


def _are_summed(task: ShardTask, start: int, said: Sequence[int | None]) -> bool:
    """Whether the bytes of every job, the first of which begins at `start`, have the sum that they had."""
    return _agree_all(task.file, jobs(task.pieces, start, task.device), said, task.threads)


def _agree_all(file: Path, todo: Sequence[Job], said: Sequence[int | None], threads: int) -> bool:
    with workers(threads) as pool:
        found = pool.map(partial(_sum, file), todo)
        return len(todo) == len(said) and all(map(_agree, found, said))


def _sum(file: Path, job: Job) -> int:
    data = OWN.room.lay(job.nbytes, job.start)
    read_into(file, job.start, data.numpy().data)
    return summed(data)


def _agree(found: int, said: int | None) -> bool:
    return said is None or found == said


def _skew(pieces: Iterable[Piece], out: Output) -> int:
    """Where in a page the tensors should begin, so that what is moved lies in pages as it does in its file.

    That matters to a file system that lets files share pages, and to no other.
    """
    reached = 0
    for piece in pieces:
        if (stored := piece.copied) and piece.nbytes >= PAGE:
            skew = (stored.start - reached) % PAGE
            return skew if skew % 8 == 0 and sharing(out, stored.file) else 0
        reached += piece.nbytes
    return 0


def header(pieces: Iterable[Piece], metadata: Mapping[str, str], skew: int = 0) -> bytes:
    """The beginning of a file that holds these tensors; of a large one whole pages and `skew` bytes."""
    said: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    reached = 0
    for piece in pieces:
        stop = reached + piece.nbytes
        said[piece.name] = {
            "dtype": WORDS[piece.dtype],
            "shape": list(piece.shape),
            "data_offsets": [reached, stop],
        }
        reached = stop
    text = json.dumps(said, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * ((skew - PREFIX - len(text)) % (PAGE if reached >= BLOCK else 8))
    return len(text).to_bytes(PREFIX, "little") + text
