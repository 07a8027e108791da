"""The sites of a module tree."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from peftsurgery.live.grafts import Graft
from peftsurgery.site import Kind, Layout, Site


def walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every submodule by the name it has on the ungrafted model; what a graft wears inside is skipped."""
    for name, child in module._modules.items():
        if child is None:
            continue
        full = f"{prefix}.{name}" if prefix else name
        yield full, child
        yield from walk(child.root if isinstance(child, Graft) else child, full)


def sites(model: nn.Module) -> list[Site]:
    """Every module that owns a weight, in the model's order.

    A module that stands under several names is listed by the first of them.
    """
    found, seen = [], set()
    hidden = _hidden(model)
    for name, module in walk(model):
        root = module.root if isinstance(module, Graft) else module
        if id(root) in seen:
            continue
        seen.add(id(root))
        weight = root._parameters.get("weight")
        if weight is not None:
            kind, layout = (Kind.OTHER, Layout.OUT_IN) if id(root) in hidden else _kind(root, weight)
            found.append(Site(name, kind, tuple(weight.shape), layout))
    return found


def everywhere(new: Mapping[str, nn.Module], walked: Sequence[tuple[str, nn.Module]]) -> dict[str, nn.Module]:
    """Each new module at every name that the one it replaces stands under."""
    first = {id(module): name for name, module in reversed(walked)}
    return {name: new[first[id(module)]] for name, module in walked if first[id(module)] in new}


def ties(model: nn.Module) -> list[tuple[str, ...]]:
    """Groups of tensor names that are one and the same parameter, in different modules."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, module in _distinct(model):
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                names[id(parameter)].append(f"{name}.{leaf}")
    return [tuple(group) for group in names.values() if len(group) > 1]


def _distinct(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    seen: set[int] = set()
    for name, module in walk(model):
        root = module.root if isinstance(module, Graft) else module
        if id(root) not in seen:
            seen.add(id(root))
            yield name, root


def _hidden(model: nn.Module) -> set[int]:
    """Modules whose parent reads their weight without calling them, so that a graft would do nothing."""
    return {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}


def _kind(module: nn.Module, weight: nn.Parameter) -> tuple[Kind, Layout]:
    if not weight.is_floating_point():
        return Kind.OTHER, Layout.OUT_IN
    if isinstance(module, nn.Linear):
        return Kind.LINEAR, Layout.OUT_IN
    if is_conv1d(module):
        return Kind.LINEAR, Layout.IN_OUT
    if isinstance(module, nn.Embedding):
        return Kind.EMBEDDING, Layout.IN_OUT
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == 1:
        return Kind.CONV, Layout.OUT_IN
    return Kind.OTHER, Layout.OUT_IN


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D; without importing transformers for the question."""
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and isinstance(module, library.Conv1D)
