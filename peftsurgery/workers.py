"""Threads for work on tensors, each of which computes alone.

torch shares one operation among its own threads, which can change the last bit of a matrix product. A worker's
operations are its own, and the work is shared by giving every worker another piece of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache

import torch

LARGEST_KEPT = 8 << 20
"""Bytes; more than any tile has."""


@contextmanager
def workers(count: int) -> Iterator[Executor]:
    """An executor of up to `count` threads, in each of which torch uses one; what fails cancels what waits."""
    _keep_memory()
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                yield pool
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(before)  # of threads to come: a worker's word counts for them too


@contextmanager
def alone() -> Iterator[None]:
    """Let torch use one thread within the block, in the thread that runs it."""
    _keep_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def _keep_memory() -> None:
    """Have the C library keep the memory of freed tiles, which it learns from one large block that is freed.

    Otherwise it gives every one back and asks for the next, and clearing those pages takes five times as long as
    folding (https://www.gnu.org/software/libc/manual/html_node/Malloc-Tunable-Parameters.html).
    """
    torch.empty(LARGEST_KEPT, dtype=torch.uint8)
