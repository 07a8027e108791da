"""One process at a time: a lock on a directory, which goes with the process that has it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from peftsurgery.disk.durable import held
from peftsurgery.errors import CheckpointError


@contextmanager
def locked(directory: Path, doing: str) -> Iterator[None]:
    """Keep other processes that ask for it out of a directory.

    Args:
        doing: what the other process is then said to be doing.

    Raises:
        CheckpointError: another process has it.
    """
    with ExitStack() as stack:
        try:
            descriptor = stack.enter_context(held(directory))
            _lock(descriptor)
            here = os.path.samestat(os.fstat(descriptor), directory.stat())
        except (BlockingIOError, FileNotFoundError):
            here = False
        if not here:  # another has it, or had it and has renamed or removed it
            raise CheckpointError(f"Another process is {doing}. Wait until it is done; nothing was changed.")
        yield


def _lock(descriptor: int) -> None:
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks
        return
