"""Making thousands of modules without Python's collector walking all of them again and again."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """No garbage collection inside; what is made there stays alive anyway, so walking it frees nothing.

    Without it the cost of a site grows with the number of sites (`benchmarks/injection.py`).
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
