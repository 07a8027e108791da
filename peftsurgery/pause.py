"""Making thousands of objects, or importing them, without Python's collector walking all of them again and again."""

from __future__ import annotations

import gc
import sys
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


@contextmanager
def importing() -> Iterator[None]:
    """No garbage collection inside, and none ever of what is imported there: it stays until the process ends.

    Walking all of torch takes a tenth of a second each time, which a short command feels.
    """
    fresh = "torch" not in sys.modules  # what else is in memory is then little, and stays too
    with collector_paused():
        yield
        if fresh:
            gc.freeze()
