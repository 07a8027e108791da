"""How a model stands while it is traced or compared; it stands as before when that is over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, each module put back to its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Attention written out as products and a softmax, which is the leanest graph up to opset 22."""
    choose = getattr(model, "set_attn_implementation", None)
    if choose is None:
        yield
        return
    before = model.config._attn_implementation  # type: ignore[union-attr]
    if before != "eager":
        choose("eager")
    try:
        yield
    finally:
        if before != "eager":
            choose(before)
