"""Progress, as values handed to a callable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Event:
    """One step of a long operation: `done` of `total` steps of `verb`, the last one being `name`."""

    verb: str
    name: str
    done: int
    total: int
    nbytes: int = 0


Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The listener that does not listen."""
