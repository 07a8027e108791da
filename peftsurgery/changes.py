"""What folding does to one stored tensor: a formula at its weight, a formula at its bias, another tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from peftsurgery.method import Params, WeightMethod
from peftsurgery.site import Layout


class Change(Protocol):
    """A pure function of a stored tensor, in float32 or wider, or of some of its rows."""

    def __call__(self, tensor: Tensor) -> Tensor:
        """The changed tensor, of the same shape."""

    def cut(self, rows: slice) -> Self | None:
        """The same change to these stored rows alone; None where it needs the whole tensor."""

    def held(self, dtype: torch.dtype) -> Self:
        """The same change with what it needs in memory, and in the dtype of the tensors that it will see."""


@dataclass(frozen=True, slots=True, eq=False)
class WeightChange:
    """A method folded into the weight of its site."""

    method: WeightMethod
    layout: Layout
    params: Params

    def __call__(self, tensor: Tensor) -> Tensor:
        near = {name: _beside(tensor, p) for name, p in self.params.items()}
        return self.layout.stored(self.method.fold(self.layout.matrix(tensor), near), tensor.shape)

    def cut(self, rows: slice) -> Self | None:
        every = slice(None)
        block = (rows, every) if self.layout is Layout.OUT_IN else (every, rows)
        part = self.method.part(self.params, *block)
        return None if part is None else replace(self, params=part)

    def held(self, dtype: torch.dtype) -> Self:
        return replace(self, params=_held(self.params, dtype))


@dataclass(frozen=True, slots=True, eq=False)
class BiasChange:
    """A method folded into the bias of its site."""

    method: WeightMethod
    params: Params

    def __call__(self, tensor: Tensor) -> Tensor:
        return self.method.fold_bias(tensor, {name: p.to(tensor) for name, p in self.params.items()})

    def cut(self, rows: slice) -> Self | None:
        return None

    def held(self, dtype: torch.dtype) -> Self:
        return replace(self, params=_held(self.params, dtype))


@dataclass(frozen=True, slots=True, eq=False)
class Replacement:
    """Another tensor in the place of this one: a head, a trained bias."""

    value: Tensor

    def __call__(self, tensor: Tensor) -> Tensor:
        return self.value.to(tensor)

    def cut(self, rows: slice) -> Self | None:
        return replace(self, value=self.value[rows]) if self.value.ndim else None

    def held(self, dtype: torch.dtype) -> Self:
        return self


def _held(params: Params, dtype: torch.dtype) -> Params:
    """The parameters in memory, each read once, in this dtype."""
    return {name: p.to(dtype) for name, p in params.items()}


def _beside(tensor: Tensor, p: Tensor) -> Tensor:
    """`p` in the dtype and on the device of `tensor`; asked first, for a tile is a small thing and `to` a call."""
    return p if p.dtype is tensor.dtype and p.device == tensor.device else p.to(tensor)
