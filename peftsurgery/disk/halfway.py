"""How far a large file is written, noted beside it, so that what was interrupted goes on in its middle.

    .NAME.partial        the file, until it is whole
    .NAME.partial.json   what is on the disk: for each job in turn the sum of its bytes, and how far tensors moved

A note is written when the bytes that it speaks of are on the disk. What was written since is written again.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path

from peftsurgery.disk.durable import discard, write_json, writing
from peftsurgery.tally import Tally

NOTE = ".partial.json"
EVERY = 512 << 20
"""How the name of a note ends, and the bytes from one note to the next: less than a second's work."""


@dataclass(slots=True)
class Halfway:
    """A file that is being written.

    Args:
        file: its name when it is whole.
        start: where its tensors begin, which is otherwise where it can share pages with the base.
        sums: for each job that is done what its bytes are known by.
        tallies: how far they moved the tensors.
        since: bytes that were written after the last note.
    """

    file: Path
    start: int
    sums: list[int | None] = field(default_factory=list)
    tallies: defaultdict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    since: int = 0

    def wrote(self, descriptor: int, nbytes: int) -> None:
        """Count bytes of the open file, and note what is written where that is much.

        Raises:
            CheckpointError: the disk refuses.
        """
        self.since += nbytes
        if self.since < EVERY:
            return
        with writing(self.file):
            os.fsync(descriptor)
        tallies = {name: asdict(tally) for name, tally in self.tallies.items()}
        write_json(_note(self.file), {"start": self.start, "sums": self.sums, "tallies": tallies})
        self.since = 0


def unfinished(file: Path) -> Path:
    """What a file is called until it is whole."""
    return file.with_name(f".{file.name}.partial")


def parts(file: Path) -> tuple[Path, ...]:
    """The file in the making and its note, where both are there."""
    both = unfinished(file), _note(file)
    return both if all(part.is_file() for part in both) else ()


def found(file: Path, start: int) -> Halfway:
    """What is noted of a file whose tensors begin at `start`; a note of another, or of none, says nothing."""
    known = Halfway(file, start)
    if not parts(file):
        return known
    try:
        said = json.loads(_note(file).read_bytes())
        known.tallies.update({name: Tally(**told) for name, told in said["tallies"].items()})
        known.sums.extend(said["sums"])
        return known if said["start"] == start else Halfway(file, start)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Halfway(file, start)


def forget(file: Path) -> None:
    """Remove what is noted of a file, and what was written of it where it is not whole.

    Raises:
        CheckpointError: it cannot be removed.
    """
    for part in (unfinished(file), _note(file)):
        if part.exists():
            discard(part)


def _note(file: Path) -> Path:
    return file.with_name(f".{file.name}{NOTE}")
