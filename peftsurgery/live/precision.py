"""A model in another dtype than it was loaded in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from peftsurgery.live.pretrained import inside
from peftsurgery.live.swap import refill


def convert(model: nn.Module, dtype: torch.dtype) -> Callable[[], None]:
    """Round the model's parameters to `dtype`; what comes back puts the old ones in their places.

    Those that transformers keeps in float32, because the model overflows or loses too much without
    (`_keep_in_fp32_modules`: T5's `wo` in float16), are kept so here. Buffers stay as they are: rotary frequencies
    are computed in float32 in every dtype.
    """
    islands = _kept(model, dtype)
    old: dict[int, nn.Parameter] = {}

    def made(parameter: nn.Parameter) -> nn.Parameter:
        wanted = torch.float32 if id(parameter) in islands else dtype
        if not parameter.is_floating_point() or parameter.dtype == wanted:
            return parameter
        new = nn.Parameter(parameter.detach().to(wanted), requires_grad=parameter.requires_grad)
        old[id(new)] = parameter
        return new

    refill(model, made)
    return lambda: refill(model, lambda parameter: old.get(id(parameter), parameter))


@contextmanager
def exact(model: nn.Module) -> Iterator[None]:
    """The model in float32, with the weights that half precision left it; as it was afterwards."""
    if coarsest(model).itemsize >= torch.float32.itemsize:
        yield
        return
    undo = convert(model, torch.float32)
    try:
        yield
    finally:
        undo()


def coarsest(model: nn.Module) -> torch.dtype:
    """The dtype that rounds most of those that the parameters have."""
    found = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return max(found, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def _kept(model: nn.Module, dtype: torch.dtype) -> Collection[int]:
    """The parameters, by identity, that stay in float32."""
    if dtype not in (torch.float16, torch.bfloat16):
        return ()
    words = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        words |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    named = model.named_parameters(remove_duplicate=False)
    return {id(parameter) for name, parameter in named if inside(name, words)}
