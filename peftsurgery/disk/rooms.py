"""Memory that bytes pass through on their way from one file to another, and that is kept for the next ones.

It is mapped, not allocated: what a thread's allocator has handed out once it seldom gives back.
"""

from __future__ import annotations

import mmap
import threading

import torch
from torch import Tensor

PAGE = 4096


class Room:
    """Memory that bytes are laid into, again and again."""

    def __init__(self) -> None:
        self._pages = torch.empty(0, dtype=torch.uint8)

    def lay(self, nbytes: int, start: int = 0) -> Tensor:
        """Bytes (uint8) that lie in memory as those from `start` on lie in a file: a page begins where a page begins.

        They are the same memory as those that were asked for before.
        """
        if self._pages.numel() < nbytes + PAGE:
            self._pages = torch.frombuffer(mmap.mmap(-1, nbytes + PAGE), dtype=torch.uint8)
        return self._pages[start % PAGE : start % PAGE + nbytes]


class Own(threading.local):
    """The room of the thread that asks."""

    def __init__(self) -> None:
        self.room = Room()


OWN = Own()


def typed(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as numbers; a copy where they do not lie as numbers of that size do."""
    return raw.view(dtype) if raw.storage_offset() % dtype.itemsize == 0 else raw.clone().view(dtype)
