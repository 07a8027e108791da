"""Stopping a process at each of its calls that change the disk, or read it: killed, interrupted, or refused."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHANGES = (
    "pwrite",
    "fsync",
    "rename",
    "unlink",
    "mkdir",
    "rmdir",
    "ftruncate",
    "posix_fallocate",
    "sendfile",
)
"""The functions of `os` by which peftsurgery changes the disk."""
READS = ("preadv", "pread")
SETTLED = 10
"""So many times a millisecond apart the number of threads has to be the same."""
LONGEST = 120
"""Seconds that the work of a child may take; one that hangs is killed, and has not come to its end."""
UNREACHED = 0
"""The exit code of work that came to its end and was not struck."""


def strike(at: int, how: str, calls: tuple[str, ...]) -> list[int]:
    """Make the `at`-th of these calls the last one of this process, or an error; how many were made.

    Args:
        how: `kill`, `torn` (killed with half of a write done), `interrupt`, or the number of an error.
    """
    reached = [0]

    def wrap(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def struck(*args: Any, **words: Any) -> Any:
            reached[0] += 1
            if reached[0] == at:
                if how == "torn" and name == "pwrite":
                    _half(call, *args)
                if how in ("kill", "torn"):
                    os.kill(os.getpid(), signal.SIGKILL)
                raise KeyboardInterrupt if how == "interrupt" else OSError(int(how), os.strerror(int(how)))
            return call(*args, **words)

        return struck

    for name in calls:
        setattr(os, name, wrap(name, getattr(os, name)))
    return reached


def _half(write: Callable[..., int], descriptor: int, data: Any, start: int) -> None:
    """Half of a write; nothing where that is no whole number of pages and the file takes only those."""
    try:
        write(descriptor, bytes(data)[: len(data) // 2], start)
    except OSError:
        return


def struck(work: Callable[[], object], at: int, how: str, calls: tuple[str, ...] = CHANGES) -> int:
    """What became of the work, done in a child that is struck: `UNREACHED`, or something else."""
    wait_for_threads()
    child = os.fork()
    if child == 0:
        code = 1
        signal.alarm(LONGEST)
        try:
            reached = strike(at, how, calls)
            work()
            code = UNREACHED if reached[0] < at else 2
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def wait_for_threads() -> None:
    """Until threads that have ended are gone: a fork in their last moment leaves locks of libraries shut.

    Libraries keep threads of their own, which Python does not count and which never end: a number of threads that
    stays the same is of those.
    """
    tasks = Path("/proc/self/task")
    before, unchanged = -1, 0
    while tasks.is_dir() and unchanged < SETTLED:
        now = len(list(tasks.iterdir()))
        if now <= threading.active_count():
            return
        unchanged = unchanged + 1 if now == before else 0
        before = now
        time.sleep(0.001)


def points(
    work: Callable[[], object], how: str, calls: tuple[str, ...] = CHANGES, step: int = 1
) -> Iterator[int]:
    """Strike at every `step`-th call in turn; the caller looks at what is left, until the work comes to its end."""
    for at in range(1, 500, step):
        if struck(work, at, how, calls) == UNREACHED:
            return
        yield at
    pytest.fail("it never ended")
