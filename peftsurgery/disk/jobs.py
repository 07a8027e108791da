"""What there is to do for one file: bytes to move, rows to make; each by itself, in any order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import merge
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor

from peftsurgery.disk.output import Output, put, share
from peftsurgery.disk.pieces import BLOCK, Block, Piece, blocks, make, read, span
from peftsurgery.disk.rooms import PAGE, Room, typed
from peftsurgery.disk.shard import read_into
from peftsurgery.tally import Tally

NOTHING = Tally()


@dataclass(frozen=True, slots=True)
class Ran:
    """What a job did.

    Args:
        sum: `summed` of its bytes; None where the file system shares them with the base.
        data: what is still to be written, from its start on (uint8); None where nothing is.
        tally: how far it moved them from the base.
    """

    sum: int | None
    data: Tensor | None
    tally: Tally = NOTHING


@dataclass(frozen=True, slots=True)
class Move:
    """Bytes of a file, from `begin` on, that go to `start` in the output as they are."""

    file: Path
    begin: int
    start: int
    nbytes: int

    def run(self, out: Output, room: Room, *, device: str, measure: int) -> Ran:
        head = min(-self.start % PAGE, self.nbytes)
        body = (self.nbytes - head) // PAGE * PAGE
        if share(out, self.file, self.begin + head, self.start + head, body):
            for begin, stop in ((0, head), (head + body, self.nbytes)):
                put(out, self.start + begin, self._read(torch.empty(stop - begin, dtype=torch.uint8), begin))
            return Ran(None, None)
        data = self._read(room.lay(self.nbytes, self.start))
        return Ran(summed(data), data)

    def _read(self, data: Tensor, begin: int = 0) -> Tensor:
        read_into(self.file, self.begin + begin, data.numpy().data)
        return data


@dataclass(frozen=True, slots=True)
class Make:
    """Rows of a tensor that are computed and go to `start` in the output."""

    piece: Piece
    block: Block
    start: int
    nbytes: int

    def run(self, out: Output, room: Room, *, device: str, measure: int) -> Ran:
        base = read(self.piece, self.block)
        made = typed(room.lay(self.nbytes, self.start), self.piece.dtype)
        tally = make(self.piece, self.block, base, made.view(base.shape), device=device, measure=measure)
        data = made.view(torch.uint8)
        return Ran(summed(data), data, tally)


Job = Move | Make


def summed(data: Tensor) -> int:
    """The sum of bytes (uint8) as little-endian words of eight, modulo 2^64: ten times as fast as a CRC.

    It tells whether bytes that were written are there; it is no hash that withstands intent.
    """
    whole = data.numel() - data.numel() % 8
    rest = int.from_bytes(data[whole:].numpy().tobytes(), "little")
    return (int(typed(data[:whole], torch.int64).sum()) + rest) % (1 << 64)


def jobs(pieces: Iterable[Piece], start: int, device: str) -> list[Job]:
    """What there is to do for these tensors, which begin at `start` in the output.

    Copies stand among computations as evenly as they can: they keep the disk busy, and the others the cores.
    """
    todo = list(_in_order(pieces, start, device))
    copies = [job for job in todo if isinstance(job, Move)]
    rest = [job for job in todo if isinstance(job, Make)]
    return [job for _, job in merge(_spread(copies), _spread(rest), key=itemgetter(0))]


def _spread(some: Sequence[Job]) -> Iterator[tuple[float, Job]]:
    """Each with how much of them all stands in front of it."""
    return (((number + 0.5) / len(some), job) for number, job in enumerate(some))


def _in_order(pieces: Iterable[Piece], start: int, device: str) -> Iterator[Job]:
    """The jobs, in the order of their bytes."""
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
            yield from makes(piece, start, device)
        start += piece.nbytes
    yield from _cut(run)


def _cut(run: Move) -> Iterator[Move]:
    """A run of bytes in pieces that begin on the pages of the output."""
    stop = run.start + run.nbytes
    for at in (run.start, *range(run.start - run.start % BLOCK + BLOCK, stop, BLOCK)):
        until = min(stop, at - at % BLOCK + BLOCK)
        if until > at:
            yield Move(run.file, run.begin + at - run.start, at, until - at)


def makes(piece: Piece, start: int, device: str) -> Iterator[Make]:
    """What there is to compute for a tensor that begins at `start` in the output."""
    for block in blocks(piece, device) if piece.nbytes else ():
        begin, stop = span(piece, block.rows)
        yield Make(piece, block, start + begin, stop - begin)
