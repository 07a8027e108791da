"""How the files of a checkpoint come to lie below a graph that reads them, and how that is said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from peftsurgery.disk.durable import lend

COPY, HARD_LINK, REFLINK, OWN, WRITTEN = "copy", "hard link", "reflink", "own", "written"


class Way(NamedTuple):
    """How one file came there, and why it was copied."""

    how: str
    why: str = ""


def lent(sources: Mapping[str, Path], directory: Path) -> dict[str, Way]:
    """Give `directory` files under these names; one that is there was written for it.

    Raises:
        CheckpointError: a file cannot be read or written.
    """
    return {
        name: Way(WRITTEN) if (directory / name).exists() else Way(*lend(source, directory / name))
        for name, source in sources.items()
    }


def told(ways: Mapping[str, Way]) -> str:
    """It in words for a person."""
    hows = {way.how for way in ways.values()}
    reasons = ", ".join(sorted({way.why for way in ways.values() if way.how == COPY}))
    made = sorted(name for name, way in ways.items() if way.how == WRITTEN)
    words = {
        OWN: "the checkpoint's own, untouched",
        COPY: f"copied, for {reasons}",
        HARD_LINK: "hard links, which ONNX Runtime reads and onnx's own checker and loader refuse",
        REFLINK: "reflinks, files of their own that share their blocks with those that they are of",
        WRITTEN: f"what is not in the checkpoint as such was written to {_listed(made)}",
    }
    return "; ".join(said for how, said in words.items() if how in hows)


def _listed(files: Sequence[str]) -> str:
    return ", ".join(files) if len(files) < 3 else f"{files[0]} and {len(files) - 1} more files"
