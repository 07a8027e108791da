"""Tensors that are folded where they lie, block by block."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from peftsurgery.changes import Change
from peftsurgery.disk.checkpoint import Checkpoint
from peftsurgery.disk.durable import opened
from peftsurgery.disk.jobs import Job, Ran, makes
from peftsurgery.disk.output import Output
from peftsurgery.disk.passing import carry_out
from peftsurgery.disk.pieces import Piece
from peftsurgery.disk.shard import Stored
from peftsurgery.disk.writer import THREADS
from peftsurgery.errors import CheckpointError, UnclaimedSites, listing
from peftsurgery.tally import EVERY, Tally


def fold_into(
    file: Path,
    held: Sequence[Stored],
    changes: Mapping[str, tuple[Change, ...]],
    tell: Callable[[Stored], None],
) -> dict[str, Tally]:
    """Fold `changes` into tensors of an existing file, in their own bytes; they are on the disk when it returns.

    Args:
        held: tensors of the file.
        tell: called with every one that is done.

    Raises:
        NonFiniteWeight: folding gave a NaN or an infinity.
        CheckpointError: the file cannot be read or written.
    """
    tallies = {}
    with opened(file) as descriptor:
        for stored in held:
            piece = Piece(stored.name, stored.torch_dtype, stored, changes[stored.name])
            tallies[stored.name] = _folded(piece, stored.start, Output(file, descriptor, None)).of(
                piece.numel
            )
            tell(stored)
    return tallies


def _folded(piece: Piece, start: int, out: Output) -> Tally:
    found = Tally()

    def done(_: Job, ran: Ran) -> None:
        nonlocal found
        found += ran.tally

    carry_out(makes(piece, start, "cpu"), out, done, threads=THREADS, measure=EVERY)
    return found


def check_claimed(checkpoint: Checkpoint, changes: Collection[str]) -> None:
    """Refuse changes to tensors that are not there.

    Raises:
        UnclaimedSites: it names them.
    """
    lost = sorted(set(changes) - set(checkpoint.tensors))
    if lost:
        raise UnclaimedSites(
            f"{checkpoint.path} has no tensor {listing(lost)}. Take the base that the adapter was trained on; nothing "
            "was changed.",
            sites=lost,
        )


def check_patchable(root: Path, held: Collection[Path]) -> None:
    """Refuse files of the model in `root` that are not its alone, or that cannot be written.

    Raises:
        CheckpointError: nothing was changed.
    """
    for file in held:
        name = file.relative_to(root)
        if any((root / part).is_symlink() for part in (name, *name.parents) if part != Path(".")):
            raise _unpatchable(file, "is a link to a file of a cache, which other models may use")
        if file.stat().st_nlink > 1:
            raise _unpatchable(
                file, "has another name too (a hard link), and what has it would change with it"
            )
    for place in (*held, root):
        if not place.stat().st_mode & 0o222 or not os.access(place, os.W_OK):
            raise _unpatchable(place, "is read-only")


def _unpatchable(file: Path, fact: str) -> CheckpointError:
    return CheckpointError(f"{file} {fact}. Merge into a new directory with `-o OUT`; nothing was changed.")
