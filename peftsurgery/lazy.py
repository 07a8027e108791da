"""Tensors that lie in files until they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Kept:
    """One tensor that lies elsewhere.

    Args:
        read: gives it, in memory of its own.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


class Lazy(Mapping[str, Tensor]):
    """Tensors by name, each read when it is asked for and held by nobody but who asked."""

    def __init__(self, kept: Mapping[str, Kept]) -> None:
        self._kept = kept

    def __getitem__(self, name: str) -> Tensor:
        return self._kept[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __contains__(self, name: object) -> bool:
        return name in self._kept

    def __len__(self) -> int:
        return len(self._kept)

    def renamed(self, names: Mapping[str, str]) -> Lazy:
        """Some of them, under other names: new name → name here."""
        return Lazy({new: self._kept[name] for new, name in names.items()})

    def outline(self) -> dict[str, Tensor]:
        """Their shapes and dtypes, as tensors without values."""
        return {
            name: torch.empty(one.shape, dtype=one.dtype, device="meta") for name, one in self._kept.items()
        }


def outlined(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors whose shapes and dtypes are those of `tensors`; none is read."""
    return tensors.outline() if isinstance(tensors, Lazy) else tensors


def renamed(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> Mapping[str, Tensor]:
    """Some of the tensors, under other names: new name → name there; none is read."""
    if isinstance(tensors, Lazy):
        return tensors.renamed(names)
    return {new: tensors[name] for new, name in names.items()}
