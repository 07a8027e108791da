"""How encoders start: what torch's own layers draw, from a generator."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt

import torch
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]


def normal(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """nn.Embedding's start: N(0, 1)."""
    return torch.randn(shape, generator=generator)


def uniform(shape: tuple[int, ...], fan_in: int, generator: torch.Generator | None) -> Tensor:
    """nn.Linear's start (fan_in is the width of its input) and nn.LSTM's (its hidden size): U(±1/√fan_in)."""
    bound = 1 / sqrt(fan_in)
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def linear(shapes: Shapes, generator: torch.Generator | None) -> dict[str, Tensor]:
    """A stack of nn.Linear: `<name>.weight` (out, in) and `<name>.bias` (out,)."""
    widths = {name.removesuffix(".weight"): shape[-1] for name, shape in shapes.items() if len(shape) == 2}
    return {
        name: uniform(shape, widths[name.rpartition(".")[0]], generator) for name, shape in shapes.items()
    }
