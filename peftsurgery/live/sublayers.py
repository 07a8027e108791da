"""Where the sublayers of a model end: the sites of output methods."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from torch import nn

from peftsurgery.errors import UnsupportedSite, listing
from peftsurgery.live.sites import walk
from peftsurgery.live.stacks import STACKS, Stack, Sublayer
from peftsurgery.site import Kind, Site


def stack_of(model: nn.Module) -> Stack:
    """The table's line for a model.

    Raises:
        UnsupportedSite: it has none, or no module gives its sublayers' outputs.
    """
    config: Any = getattr(model, "config", None)
    kind = str(getattr(config, "model_type", ""))
    if kind not in STACKS:
        raise UnsupportedSite(
            f"Where the sublayers of {type(model).__name__} end is not known; it is for "
            f"{listing(tuple(STACKS), len(STACKS))}. Take LoRA for it; nothing was changed.",
            site="",
        )
    line = STACKS[kind]
    return line if isinstance(line, Stack) else line(config)


def sublayers(model: nn.Module) -> dict[str, tuple[str, Sublayer]]:
    """For the name of every output site, in the model's order: its layer's name, and the sublayer.

    Raises:
        UnsupportedSite: the architecture is not in the table.
    """
    stack = stack_of(model)
    end = re.compile(rf"(?:.*\.)?{re.escape(stack.layers)}\.[0-9]+")
    names = dict.fromkeys(name for name, _ in walk(model))
    layers = [name for name in names if end.fullmatch(name)]
    return {f"{layer}.{sub.place}": (layer, sub) for layer in layers for sub in present(stack, names, layer)}


def present(stack: Stack, names: Collection[str], layer: str) -> list[Sublayer]:
    """The sublayers that a layer has, in a model whose modules have these names."""
    return [sub for sub in stack.sublayers if f"{layer}.{sub.core or sub.output}" in names]


def output_sites(model: nn.Module) -> tuple[Site, ...]:
    """The outputs of every sublayer, each as wide as its layer.

    Raises:
        UnsupportedSite: the architecture is not in the table.
    """
    ruler = stack_of(model).ruler
    return tuple(
        Site(name, Kind.OUTPUT, (_width(model, layer, ruler),), role=sub.role)
        for name, (layer, sub) in sublayers(model).items()
    )


def _width(model: nn.Module, layer: str, ruler: str) -> int:
    """How wide a layer is."""
    config: Any = model.config
    if not ruler:
        return int(config.hidden_size)
    norm: Any = model.get_submodule(f"{layer}.{ruler}")
    return len(norm.weight)
