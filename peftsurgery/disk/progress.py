"""What is told of the tensors of a file while they are written."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from peftsurgery.disk.pieces import Piece
from peftsurgery.events import Event, Listener


class Progress:
    """Tells of every tensor when all its bytes are there, in whatever order they come.

    Args:
        pieces: the tensors, in the order of their bytes.
        start: where those begin in the file.
    """

    def __init__(self, pieces: Sequence[Piece], start: int, listen: Listener) -> None:
        self._pieces = pieces
        self._begins = list(accumulate((piece.nbytes for piece in pieces), initial=start))
        self._missing = [piece.nbytes for piece in pieces]
        self._listen = listen
        self._folds = self._writes = 0
        self._touched = sum(bool(piece.changes) for piece in pieces)
        for number, piece in enumerate(pieces):
            if not piece.nbytes:
                self._tell(number)

    def wrote(self, start: int, nbytes: int) -> None:
        """These bytes of the file are there."""
        number = bisect_right(self._begins, start) - 1
        while number < len(self._pieces) and self._begins[number] < start + nbytes:
            begin, stop = self._begins[number : number + 2]
            common = min(stop, start + nbytes) - max(begin, start)
            self._missing[number] -= common
            if common and not self._missing[number]:
                self._tell(number)
            number += 1

    def _tell(self, number: int) -> None:
        piece = self._pieces[number]
        if piece.changes:
            self._folds += 1
            self._listen(Event("fold", piece.name, self._folds, self._touched, piece.nbytes))
        self._writes += 1
        self._listen(Event("write", piece.name, self._writes, len(self._pieces), piece.nbytes))


def tell_all(pieces: Sequence[Piece], listen: Listener) -> None:
    """Tell of every tensor of a file that is there."""
    Progress(pieces, 0, listen).wrote(0, sum(piece.nbytes for piece in pieces))
