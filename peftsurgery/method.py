"""A method is a formula: a frozen dataclass of hyper-parameters and pure functions over tensors.

It never sees a module, a file, a graph, a dtype, a device or a transposed weight. Its parameters
are a mapping from the names that the PEFT file format gives them (`lora_A.weight`) to tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor

from peftsurgery.errors import NotFoldable
from peftsurgery.site import Kind, Site

Params = Mapping[str, Tensor]


Map = Callable[[Tensor], Tensor]
"""A pure function of one tensor."""


class Op(Protocol):
    """What a weight method may ask of the linear operation that it grafts.

    `x` is the operation's own input; the place casts and lays out every (out, in) matrix.
    """

    def __call__(self, x: Tensor) -> Tensor:
        """The untouched base, bias and hooks included."""

    def folded(self, x: Tensor, fold: Map, fold_bias: Map) -> Tensor:
        """The base with `fold(W)` for its (out, in) weight and `fold_bias(b)` for its bias."""

    def inner(self, x: Tensor, matrix: Tensor) -> Tensor:
        """The same operation, same stride and padding, with a (k, in) matrix and no bias."""

    def outer(self, h: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        """An (out, k) matrix, and a bias of shape (out,), applied to what `inner` gave."""

    def drop(self, x: Tensor) -> Tensor:
        """Dropout, in training mode; the identity otherwise, and on integer inputs."""


@dataclass(frozen=True)
class Method(ABC):
    """One parameter-efficient method with its hyper-parameters."""

    name: ClassVar[str]
    """The word for it, on the command line and in `METHODS`."""
    peft_type: ClassVar[str]
    """The word for it in PEFT's `adapter_config.json`."""
    kinds: ClassVar[frozenset[Kind]]
    """The kinds of site that it can be put at."""

    def check(self, site: Site) -> str | None:
        """Why the method cannot be put at `site`, as the end of a sentence; None if it can."""
        if site.kind is Kind.OTHER:
            return "has a weight that is quantised, grouped, a norm's, or read by its parent directly"
        return (
            None
            if site.kind in self.kinds
            else f"is for {site.kind.value}, which {self.name} has no formula for"
        )

    @abstractmethod
    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """The names and shapes of the parameters at `site`."""

    @abstractmethod
    def init(
        self, site: Site, weight: Tensor | None, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Fresh float32 parameters for `site` on the CPU; `weight` is its (out, in) matrix where known."""

    def scaled(self, factor: float) -> Self:
        """The method whose effect is `factor` times this one's."""
        raise NotFoldable(f"{self.name} has no scale of its own. Export the model with it instead.")


@dataclass(frozen=True)
class WeightMethod(Method):
    """A method that cuts a weight: `fold` is its definition, `forward` only a faster way to say it."""

    @property
    def dropout(self) -> float:
        """Probability with which an input is dropped in training."""
        return 0.0

    @abstractmethod
    def fold(self, w: Tensor, p: Params) -> Tensor:
        """The new (out, in) weight; `w` and every parameter are float32."""

    @property
    def moves_bias(self) -> bool:
        """Whether `fold_bias` does anything, so that the site must have a bias."""
        return False

    def fold_bias(self, bias: Tensor, p: Params) -> Tensor:
        """The new bias of shape (out,); most methods leave it alone."""
        return bias

    def forward(self, op: Op, x: Tensor, p: Params) -> Tensor:
        """The base operation with `fold(W)`; override it to be faster, never to mean something else."""
        return op.folded(x, lambda w: self.fold(w, p), lambda b: self.fold_bias(b, p))
