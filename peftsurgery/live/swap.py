"""The only file that changes a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from peftsurgery.errors import PlanError
from peftsurgery.live.grafts import Graft

CHART = "_peftsurgery"


class Before(Protocol):
    """A hook that rewrites the arguments of a module's call; None leaves them alone."""

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None: ...


class After(ABC):
    """A hook that rewrites what a module gives; None leaves it alone."""

    __slots__ = ()

    @abstractmethod
    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any: ...


Hook = Before | After


def swap(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Put each module at its name and return what stood there; `swap` of that undoes it, bit for bit.

    Raises:
        PlanError: a name that the model does not have; nothing has been changed.
    """
    parents: dict[str, nn.Module] = {}
    places = {name: _place(model, name, parents) for name in modules}
    old = {name: parent._modules[leaf] for name, (parent, leaf) in places.items()}
    try:
        for name, (parent, leaf) in places.items():
            parent._modules[leaf] = modules[name]
    except BaseException:
        for name, (parent, leaf) in places.items():
            parent._modules[leaf] = old[name]
        raise
    return {name: module for name, module in old.items() if module is not None}


def hook(model: nn.Module, hooks: Iterable[tuple[str, Hook]]) -> None:
    """Let each hook rewrite the calls of the module of its name (`""` is the model itself).

    Hooks compare by value, so that those of a copy of the model can be taken off by the original's.

    Raises:
        AttributeError: a name that the model does not have; nothing has been changed.
    """
    for module, own in [(model.get_submodule(name), own) for name, own in hooks]:
        if isinstance(own, After):
            module.register_forward_hook(own, with_kwargs=True)
        else:
            module.register_forward_pre_hook(own, with_kwargs=True)


def unhook(model: nn.Module, hooks: Iterable[tuple[str, Hook]]) -> None:
    """Take the hooks off again."""
    for name, own in hooks:
        module = model.get_submodule(name)
        for table, marks in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        ):
            for key in [key for key, found in table.items() if found == own]:
                del table[key]
                marks.pop(key, None)


def require_grad(parameters: Iterable[nn.Parameter], flag: bool) -> None:
    """Let the parameters train, or keep them from it."""
    for parameter in parameters:
        parameter.requires_grad_(flag)


def refill(model: nn.Module, make: Callable[[nn.Parameter], nn.Parameter]) -> None:
    """Put what `make` gives in the place of each parameter; a tied one is made once and stays tied."""
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                # The old one is held, for an address that is free again may be another's.
                if id(parameter) not in made:
                    made[id(parameter)] = (parameter, make(parameter))
                module._parameters[name] = made[id(parameter)][1]


def fill(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values into the buffers of these names."""
    buffers = dict(model.named_buffers())
    for name, value in values.items():
        buffers[name].copy_(value)


def annotate(model: nn.Module, chart: object | None) -> None:
    """Write the chart of what was grafted onto the model, or wipe it."""
    if chart is not None:
        model.__dict__[CHART] = chart
    else:
        model.__dict__.pop(CHART, None)


def tie_config(model: nn.Module, tied: bool | None) -> bool | None:
    """Make the model's config say whether its output embeddings are the input ones; returns what it said.

    `None` leaves it alone, and comes back from a model without such a config.
    """
    config = getattr(model, "config", None)
    before = getattr(config, "tie_word_embeddings", None)
    if tied is not None and before is not None:
        config.tie_word_embeddings = tied  # type: ignore[union-attr]
    return before


def _place(model: nn.Module, name: str, parents: dict[str, nn.Module]) -> tuple[nn.Module, str]:
    """The module that holds `name`, and the last part of it; `parents` remembers those found before."""
    above, _, leaf = name.rpartition(".")
    if above not in parents:
        parents[above] = _parent(model, above)
    if not name or parents[above]._modules.get(leaf) is None:
        raise PlanError(f"{type(model).__name__} has no module {name!r} to swap. Nothing was changed.")
    return parents[above], leaf


def _parent(model: nn.Module, name: str) -> nn.Module:
    try:
        parent = model.get_submodule(name)
    except AttributeError:
        return nn.Module()
    return parent.root if name and isinstance(parent, Graft) else parent
