"""One safetensors file, written: a pure function of a task that can be sent to another process and run twice."""

from __future__ import annotations

import json
import os
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from peftsurgery.disk.output import Output, output, put
from peftsurgery.disk.pieces import BLOCK, Block, Piece, blocks, make, read, span
from peftsurgery.disk.rooms import PAGE, ROOMS, typed
from peftsurgery.disk.shard import DTYPES, PREFIX, read_into
from peftsurgery.events import Event, Listener, ignore
from peftsurgery.tally import Tally
from peftsurgery.workers import workers

WORDS = {dtype: word for word, dtype in DTYPES.items()}
THREADS = min(8, (os.cpu_count() or 1) + 2)
"""Two more than cores, for those that wait for the disk; each holds two blocks and a few tiles."""


@dataclass(frozen=True, slots=True, eq=False)
class ShardTask:
    """One file to write.

    Args:
        pieces: its tensors, in the order of their bytes.
        mode: the permissions of the file; what the user's mask leaves by default.
        device: where folding is computed.
        measure: whether to tell how far every touched tensor moved.
        threads: how many work on it; they do not change a bit of it.
    """

    file: Path
    pieces: tuple[Piece, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    mode: int | None = None
    device: str = "cpu"
    measure: bool = False
    threads: int = THREADS

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
    """

    file: Path
    nbytes: int
    tallies: Mapping[str, Tally]


@dataclass(frozen=True, slots=True)
class Move:
    """Bytes of a file, from `begin` on, that go to `start` in the output as they are."""

    file: Path
    begin: int
    start: int
    nbytes: int

    def run(self, out: Output, task: ShardTask) -> Tally:
        data = ROOMS.room("out", self.nbytes, self.start)
        read_into(self.file, self.begin, data.numpy().data)
        put(out, self.start, data)
        return Tally()


@dataclass(frozen=True, slots=True)
class Make:
    """Rows of a tensor that are computed and go to `start` in the output."""

    piece: Piece
    block: Block
    start: int
    nbytes: int

    def run(self, out: Output, task: ShardTask) -> Tally:
        base = read(self.piece, self.block)
        made = typed(ROOMS.room("out", self.nbytes, self.start), self.piece.dtype).view(base.shape)
        found = make(self.piece, self.block, base, made, device=task.device, measure=task.measure)
        put(out, self.start, made.view(-1).view(torch.uint8))
        return found


def write_shard(task: ShardTask, listen: Listener = ignore) -> ShardDone:
    """Write one safetensors file; under its name it is whole, and on the disk.

    What is left alone is moved as bytes, the rest is read, folded and written in blocks, by several threads at a
    time. Running it again writes the same file again.

    Raises:
        CheckpointError: a file cannot be read or written.
        NonFiniteWeight: folding gave a NaN or an infinity.
    """
    head = header(task.pieces, task.metadata)
    size = len(head) + task.nbytes
    jobs = list(_jobs(task.pieces, len(head), task.device))
    tallies: dict[str, Tally] = defaultdict(Tally)
    events = deque(_events(task.pieces, len(head)))
    with output(task.file, size, task.mode) as out, workers(task.threads) as pool:
        put(out, 0, torch.frombuffer(bytearray(head), dtype=torch.uint8))
        for job, found in zip(jobs, pool.map(lambda job: job.run(out, task), jobs), strict=True):
            if isinstance(job, Make) and job.piece.touched:
                tallies[job.piece.name] += found
            _tell(events, job.start + job.nbytes, listen)
    _tell(events, size, listen)
    return ShardDone(task.file, size, dict(tallies))


def _events(pieces: Sequence[Piece], reached: int) -> Iterator[tuple[int, Event]]:
    """What there will be to tell, each with the byte of the output up to which it must be written."""
    touched, folds = sum(bool(piece.changes) for piece in pieces), 0
    for done, piece in enumerate(pieces, 1):
        reached += piece.nbytes
        if piece.changes:
            folds += 1
            yield reached, Event("fold", piece.name, folds, touched, piece.nbytes)
        yield reached, Event("write", piece.name, done, len(pieces), piece.nbytes)


def _tell(events: deque[tuple[int, Event]], reached: int, listen: Listener) -> None:
    while events and events[0][0] <= reached:
        listen(events.popleft()[1])


def _jobs(pieces: Iterable[Piece], start: int, device: str) -> Iterator[Move | Make]:
    """What there is to do for these tensors, which begin at `start` in the output, in the order of their bytes."""
    run = Move(Path(), 0, 0, 0)
    for piece in pieces:
        if stored := piece.copied:
            if (stored.file, stored.start) != (run.file, run.begin + run.nbytes):
                yield from _cut(run)
                run = Move(stored.file, stored.start, start, 0)
            run = replace(run, nbytes=run.nbytes + piece.nbytes)
        else:
            yield from _cut(run)
            run = Move(Path(), 0, 0, 0)
            yield from _makes(piece, start, device)
        start += piece.nbytes
    yield from _cut(run)


def _cut(run: Move) -> Iterator[Move]:
    """A run of bytes in pieces that begin on the pages of the output."""
    stop = run.start + run.nbytes
    for at in (run.start, *range(run.start - run.start % BLOCK + BLOCK, stop, BLOCK)):
        until = min(stop, at - at % BLOCK + BLOCK)
        if until > at:
            yield Move(run.file, run.begin + at - run.start, at, until - at)


def _makes(piece: Piece, start: int, device: str) -> Iterator[Make]:
    for block in blocks(piece, device) if piece.nbytes else ():
        begin, stop = span(piece, block.rows)
        yield Make(piece, block, start + begin, stop - begin)


def header(pieces: Iterable[Piece], metadata: Mapping[str, str]) -> bytes:
    """The beginning of a file that holds these tensors; of a large one whole pages, so that their bytes lie well."""
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
    text += b" " * (-(PREFIX + len(text)) % (PAGE if reached >= BLOCK else 8))
    return len(text).to_bytes(PREFIX, "little") + text
