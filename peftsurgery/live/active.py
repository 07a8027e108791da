"""Several adapters on one model: which of them work, how strongly, and what of them trains."""

from __future__ import annotations

from torch import nn

from peftsurgery.live.chart import chart, record
from peftsurgery.live.grafts import Graft, StandIn, Theta
from peftsurgery.live.sites import walk


def adapters(model: nn.Module) -> tuple[str, ...]:
    """The names of the adapters on the model, in the order of injection."""
    return tuple(record.name for record in chart(model).records)


def activate(model: nn.Module, *names: str) -> None:
    """Let exactly these adapters work; none with no name. All that were injected work at first.

    Raises:
        PlanError: the model has no adapter of that name.
    """
    for name in names:
        record(model, name)
    for graft in _grafts(model):
        graft.active = graft.label in names


def rescale(model: nn.Module, name: str, weight: float) -> None:
    """Make the effect of an adapter `weight` times what it is now.

    Raises:
        PlanError: the model has no adapter of that name.
        NotFoldable: its method has no scale.
    """
    record(model, name)
    thetas = [graft.own for graft in _grafts(model) if graft.label == name and isinstance(graft.own, Theta)]
    for theta, method in [(theta, theta.method.scaled(weight)) for theta in thetas]:
        theta.method = method


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What the adapters on the model train: their own parameters and declared heads, by name."""
    own = {
        id(parameter)
        for graft in _grafts(model)
        for parameter in (
            [graft.own.get_parameter(leaf) for leaf in graft.replaces]
            if isinstance(graft, StandIn)
            else graft.own.parameters()
        )
    }
    return {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) in own}


def canonical_name(model: nn.Module, full: str) -> str:
    """The name that a state-dict entry of a grafted model has without grafts.

    `…query.base.weight` is `…query.weight`, and a head's own `…classifier.<adapter>.weight` is
    `…classifier.weight`; a method's parameters keep their names.
    """
    *parts, tail = full.split(".")
    module: nn.Module | None = model
    kept = []
    for part in parts:
        inside = isinstance(module, Graft) and (part == "base" or isinstance(module, StandIn))
        if not inside:
            kept.append(part)
        module = module._modules.get(part) if module is not None else None
    return ".".join([*kept, tail])


def _grafts(model: nn.Module) -> list[Graft]:
    found = []
    for _, module in walk(model):
        while isinstance(module, Graft):
            found.append(module)
            module = module.base
    return found
