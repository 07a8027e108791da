"""Several adapters on one model: which of them work, how strongly, and what of them trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from peftsurgery.errors import PlanError
from peftsurgery.live.chart import chart, record
from peftsurgery.live.grafts import Graft, StandIn, Theta
from peftsurgery.live.outputs import OutputGraft
from peftsurgery.live.sites import walk
from peftsurgery.live.swap import require_grad


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
    thetas = _thetas(graft for graft in _grafts(model) if graft.label == name)
    for theta, method in [(theta, theta.method.scaled(weight)) for theta in thetas]:
        theta.method = method


def trainable_parameters(model: nn.Module, stage: int | None = None) -> dict[str, nn.Parameter]:
    """What the adapters on the model train: their own parameters and declared heads, by name.

    Args:
        stage: first let exactly what moves in this stage of a training in two require gradients, of the adapters
            that were injected to train: 1 for adapters, those inside a fusion too, 2 for what fuses them. A
            fresh fusion is in stage 2, all else in stage 1; declared heads train in both.

    Raises:
        PlanError: there is no such stage.
    """
    if stage is not None:
        _enter(model, stage)
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


def regularization(model: nn.Module) -> Tensor:
    """What the adapters that work and train ask to be added to the loss: a scalar, 0 where they ask nothing.

    A fusion asks for 0.01 · |V - I|² at every site, as AdapterHub does.
    """
    terms = [
        term
        for theta in _thetas(graft for graft in _grafts(model) if graft.active)
        if any(p.requires_grad for p in theta.params().values())
        if (term := theta.method.penalty(theta.params())) is not None
    ]
    return torch.stack([term.float() for term in terms]).sum() if terms else torch.zeros(())


def _enter(model: nn.Module, stage: int) -> None:
    if stage not in (1, 2):
        raise PlanError(
            f"stage is {stage!r} and is 1 (adapters) or 2 (what fuses them). Nothing was changed."
        )
    for theta in _thetas(_grafts(model)):
        for name, parameter in theta.params().items() if theta.trainable else ():
            require_grad([parameter], theta.method.stage(name) == stage)


def _thetas(grafts: Iterable[Graft]) -> Iterator[Theta]:
    for graft in grafts:
        yield from (module for module in graft.own.modules() if isinstance(module, Theta))


def canonical_name(model: nn.Module, full: str) -> str:
    """The name that a state-dict entry of a grafted model has without grafts.

    `…query.base.weight` is `…query.weight`, and a head's own `…classifier.<adapter>.weight` is
    `…classifier.weight`; a method's parameters keep their names, but those at a sublayer's output, which a
    layer wears, get AdapterHub's: `…layer.0.output.adapters.<adapter>.adapter_up.weight`.
    """
    *parts, tail = full.split(".")
    module: nn.Module | None = model
    kept: list[str] = []
    for depth, part in enumerate(parts, start=1):
        if isinstance(module, OutputGraft) and part == module.label:
            place, parameter = module.split(".".join([*parts[depth:], tail]))
            return ".".join([*kept, place, "adapters", part, parameter])
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
