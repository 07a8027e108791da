"""Files that are hashed while they are merged: their bytes come from the disk once, and then from its cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from peftsurgery.disk.identity import known


@contextmanager
def hashed(files: Sequence[Path]) -> Iterator[None]:
    """Have a thread beside the block hash files, one after the other; `known` then has their SHA-256.

    Raises:
        CheckpointError: a file cannot be read.
    """
    with ThreadPoolExecutor(1) as pool:
        coming = [pool.submit(known, file, full=True) for file in files]
        try:
            yield
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        for one in coming:
            one.result()
