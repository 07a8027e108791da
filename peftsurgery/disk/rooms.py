"""Memory that bytes pass through on their way from one file to another: every thread has its own, and keeps it.

It is mapped, not allocated: what a thread's allocator has handed out once it seldom gives back.
"""

from __future__ import annotations

import mmap
import threading

import torch
from torch import Tensor

PAGE = 4096


class Rooms(threading.local):
    """The rooms of the thread that asks."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def room(self, use: str, nbytes: int, start: int = 0) -> Tensor:
        """Bytes (uint8) that lie in memory as those from `start` on lie in a file: a page begins where a page begins.

        They are the thread's until it asks for a room of the same use again.
        """
        held = self._held.get(use)
        if held is None or held.numel() < nbytes + PAGE:
            self._held.pop(use, None)
            held = torch.frombuffer(mmap.mmap(-1, nbytes + PAGE), dtype=torch.uint8)
            self._held[use] = held
        return held[start % PAGE : start % PAGE + nbytes]


ROOMS = Rooms()


def typed(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as numbers; a copy where they do not lie as numbers of that size do."""
    return raw.view(dtype) if raw.storage_offset() % dtype.itemsize == 0 else raw.clone().view(dtype)
