"""Tensors that are folded where they lie, block by block."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from peftsurgery.changes import Change
from peftsurgery.disk.checkpoint import Checkpoint
from peftsurgery.disk.durable import opened
from peftsurgery.disk.jobs import Job, Make, Ran, makes
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
    """Fold `changes` into tensors of an existing file, in their own bytes, which are not on the disk yet.

    Args:
        held: tensors of the file.
        tell: called with every one that is done.

    Raises:
        NonFiniteWeight: folding gave a NaN or an infinity.
        CheckpointError: the file cannot be read or written.
    """
    pieces = {s.name: Piece(s.name, s.torch_dtype, s, changes[s.name]) for s in held}
    todo = [job for s in held for job in makes(pieces[s.name], s.start, "cpu")]
    left = Counter(job.piece.name for job in todo)
    places = {s.name: s for s in held}
    tallies: defaultdict[str, Tally] = defaultdict(Tally)

    def done(job: Job, ran: Ran) -> None:
        assert isinstance(job, Make)
        name = job.piece.name
        tallies[name] += ran.tally
        left[name] -= 1
        if not left[name]:
            tell(places[name])

    with opened(file, sync=False) as descriptor:
        carry_out(todo, Output(file, descriptor, None), done, threads=THREADS, measure=EVERY)
    return {name: tallies[name].of(piece.numel) for name, piece in pieces.items()}


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
