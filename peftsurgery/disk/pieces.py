"""What one tensor of an output is made of, and how it is made some rows at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from peftsurgery.changes import Change
from peftsurgery.disk.rooms import OWN
from peftsurgery.disk.shard import Stored, load, read_into
from peftsurgery.fold import fold_tile, tiles, working
from peftsurgery.tally import Tally

BLOCK = 4 << 20
"""Bytes that are read, folded and written together."""


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """One tensor of an output.

    Args:
        name: what it is called there.
        dtype: how it is stored there.
        origin: the tensor of the base that it is made from, or a new one in memory.
        changes: what is folded into it, from `fold.touches`.
    """

    name: str
    dtype: torch.dtype
    origin: Stored | Tensor
    changes: tuple[Change, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.origin.shape)

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def row(self) -> int:
        """Elements of one row: all there is to one index of the first axis."""
        return prod(self.shape[1:])

    @property
    def source(self) -> torch.dtype:
        """The dtype of what it is made from."""
        return self.origin.torch_dtype if isinstance(self.origin, Stored) else self.origin.dtype

    @property
    def touched(self) -> bool:
        """Whether a tensor of the base is changed, which is not said of a cast."""
        return bool(self.changes) and isinstance(self.origin, Stored)

    @property
    def copied(self) -> Stored | None:
        """What is copied byte for byte, where that is all there is to do."""
        stored = self.origin if isinstance(self.origin, Stored) else None
        return stored if not self.changes and self.dtype is self.source else None


@dataclass(frozen=True, slots=True)
class Block:
    """Some rows of a piece: one or several of its tiles.

    Args:
        first: the number of the first one among all of the piece.
    """

    tiles: tuple[slice, ...]
    first: int = 0

    @property
    def rows(self) -> slice:
        """All of its rows."""
        return slice(self.tiles[0].start, self.tiles[-1].stop)


def blocks(piece: Piece, device: str = "cpu", nbytes: int = BLOCK) -> Iterator[Block]:
    """The piece, cut at the borders of its tiles into blocks of about `nbytes`, in order."""
    wide = piece.row * max(piece.dtype.itemsize, piece.source.itemsize)
    held: list[slice] = []
    first = 0
    for rows in tiles(piece.changes, piece.shape, device):
        if held and (rows.stop - held[0].start) * wide > nbytes:
            yield Block(tuple(held), first)
            first += len(held)
            held = []
        held.append(rows)
    yield Block(tuple(held), first)


def read(piece: Piece, block: Block) -> Tensor:
    """The rows of a block as they are in what the piece is made from: (rows, …), or () for a scalar.

    They are the thread's until it reads the next.

    Raises:
        CheckpointError: the file cannot be read, or has changed.
    """
    origin, rows = piece.origin, block.rows
    if isinstance(origin, Tensor):
        return (origin.detach()[rows] if origin.ndim else origin.detach()).cpu()
    shape = (rows.stop - rows.start, *piece.shape[1:]) if piece.shape else ()
    begin = origin.start + rows.start * piece.row * piece.source.itemsize
    raw = OWN.room.lay(prod(shape) * piece.source.itemsize)
    read_into(origin.file, begin, raw.numpy().data)
    return raw.view(piece.source).view(shape)


@torch.no_grad()
def make(
    piece: Piece, block: Block, base: Tensor, out: Tensor, *, device: str = "cpu", measure: int = 0
) -> Tally:
    """Fold a block: `base` is what `read` gave, `out` has its shape and the piece's dtype.

    Args:
        measure: every how many-th tile of the piece is measured; 0 for none.

    Raises:
        NonFiniteWeight: folding gave a NaN or an infinity.
    """
    if not piece.changes:
        out.copy_(base)
        return Tally()
    found, first, changes = Tally(), block.rows.start, HELD.of(piece)
    for number, rows in enumerate(block.tiles, block.first):
        measured = bool(measure) and number % measure == 0
        here = slice(rows.start - first, rows.stop - first) if piece.shape else ...
        found += fold_tile(piece.name, changes, base[here], rows, out[here], device=device, measure=measured)
    return found


def whole(piece: Piece) -> Tensor:
    """All of it, in memory; what is neither changed nor cast is mapped, and read when it is used."""
    base = load(piece.origin) if isinstance(piece.origin, Stored) else piece.origin.detach()
    if not piece.changes:
        return base.to(piece.dtype)
    made = torch.empty(piece.shape, dtype=piece.dtype)
    make(piece, Block(tiles(piece.changes, piece.shape)), base, made)
    return made


class Held:
    """What the changes of the pieces that threads are at need, in memory; that of earlier ones is let go."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._recent: dict[Piece, tuple[Change, ...]] = {}

    def of(self, piece: Piece) -> tuple[Change, ...]:
        """The changes of this piece."""
        with self._lock:
            if piece not in self._recent:
                while len(self._recent) >= RECENT:
                    del self._recent[next(iter(self._recent))]
                self._recent[piece] = tuple(change.held(working(piece.source)) for change in piece.changes)
            return self._recent[piece]

    def clear(self) -> None:
        """Let everything go."""
        with self._lock:
            self._recent.clear()


RECENT = 3
"""Pieces that several threads are at, at the border of one and the next; large ones have many blocks."""
HELD = Held()


def span(piece: Piece, rows: slice) -> tuple[int, int]:
    """Where these rows begin and end in the piece as it is stored in the output, in bytes."""
    wide = piece.row * piece.dtype.itemsize
    return rows.start * wide, rows.stop * wide
