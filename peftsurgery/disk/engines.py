"""Who writes the files: an engine takes tasks and gives back what became of each."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from peftsurgery.disk.writer import ShardDone, ShardTask, write_shard
from peftsurgery.errors import PlanError, SurgeryError, listing
from peftsurgery.events import Listener

ENGINES = ("local", "ray")


@dataclass(frozen=True, slots=True)
class Failed:
    """A file that was not written, and why."""

    file: Path
    error: SurgeryError


Outcomes = Generator[ShardDone | Failed]
Engine = Callable[[Sequence[ShardTask], Listener], Outcomes]
"""Writes every task's file, in any order, and tells of each when it is there or cannot be.

It tells a listener what is folded and written. Whoever stops asking for more stops the work, and when its iterator is
closed nothing writes any longer.
"""


def local(tasks: Sequence[ShardTask], listen: Listener) -> Outcomes:
    """One file after the other, each by several threads of this process."""
    for task in tasks:
        try:
            yield write_shard(task, listen)
        except SurgeryError as error:
            yield Failed(task.file, error)


@contextmanager
def engine(word: str) -> Iterator[Engine]:
    """The engine that is called so, `local` or `ray`, ready for as long as the block runs.

    Raises:
        PlanError: there is none, or what it needs is not there.
    """
    if word == "local":
        yield local
    elif word == "ray":
        from peftsurgery.disk.on_ray import cluster

        with cluster() as on_ray:
            yield on_ray
    else:
        raise PlanError(f"{word!r} is no engine. Take one of {listing(ENGINES)}; nothing was written.")
