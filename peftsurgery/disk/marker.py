"""The mark of a model whose weights are being patched: it stands beside them until they are whole again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from peftsurgery.disk.durable import discard, write_json
from peftsurgery.errors import CheckpointError

MARKER = ".peftsurgery-patch.json"


@dataclass(frozen=True, slots=True)
class Mark:
    """Which undo file makes the model whole.

    Args:
        undo: where it lay.
        identity: the SHA-256 of its header.
    """

    undo: str
    identity: str


def mark(path: Path, said: Mark) -> None:
    """Mark the model in `path`; it is on the disk when this returns."""
    write_json(path / MARKER, asdict(said))


def marked(path: Path) -> Mark | None:
    """The mark of the model in `path`, where it has one.

    Raises:
        CheckpointError: the mark cannot be read.
    """
    file = path / MARKER
    if not file.is_file():
        return None
    try:
        return Mark(**json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{file} says that the model is half patched, and cannot be read ({error!s:.80}). "
            "Download the model again; nothing was changed."
        ) from error


def unmark(path: Path) -> None:
    """Say that the model in `path` is whole."""
    discard(path / MARKER)


def check_whole(path: Path) -> None:
    """Refuse a model in the middle of a patch.

    Raises:
        CheckpointError: with the command that repairs it.
    """
    found = marked(path)
    if found is not None:
        raise half_patched(path, found.undo)


def half_patched(path: Path, undo: str | Path) -> CheckpointError:
    """The error of a model that a merge in place left in the middle."""
    return CheckpointError(
        f"{path} is half patched: a merge in place or its undoing was interrupted, or is under way. "
        f"Restore it with `peftsurgery unmerge {path} --undo {undo}`, or repeat the merge with that undo file."
    )
