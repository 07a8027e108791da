"""Grafts: modules that wear an untouched base, the parameters of one adapter, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from peftsurgery.live.ops import operation
from peftsurgery.method import Method, Op, Params, WeightMethod
from peftsurgery.site import Site


class Factor(nn.Module):
    """One named factor of a method, e.g. `lora_A`; it prints as the map that it is."""

    def hold(self, name: str, parameter: nn.Parameter) -> None:
        """Take a parameter in, under a name whose dots are modules."""
        head, _, rest = name.partition(".")
        if not rest:
            self._parameters[head] = parameter
            return
        child = self._modules.setdefault(head, Factor())
        assert isinstance(child, Factor)
        child.hold(rest, parameter)

    def seat(self, place: str, theta: Factor) -> None:
        """Take in all that an adapter has at one place, under a name whose dots are modules."""
        head, _, rest = place.partition(".")
        if not rest:
            self._modules[head] = theta
            return
        child = self._modules.setdefault(head, Factor())
        assert isinstance(child, Factor)
        child.seat(rest, theta)

    def held(self, name: str) -> nn.Parameter:
        """The parameter that was taken in under that name."""
        head, _, rest = name.partition(".")
        if rest:
            child = self._modules[head]
            assert isinstance(child, Factor)
            return child.held(rest)
        parameter = self._parameters[head]
        assert parameter is not None
        return parameter

    def extra_repr(self) -> str:
        weight = self._parameters.get("weight")
        return "" if weight is None else f"{weight.shape[1:].numel()} → {weight.shape[0]}"


class Theta(Factor):
    """The parameters of one method at one site, under the names that the PEFT file format gives them."""

    method: Method
    names: tuple[str, ...]
    trainable: bool

    def __init__(self, method: Method, params: Mapping[str, Tensor], dropout: float, trainable: bool) -> None:
        super().__init__()
        self.__dict__.update(method=method, names=tuple(params), trainable=trainable)
        if dropout:
            self.add_module(f"{method.name}_dropout", nn.Dropout(dropout))
        for name, value in params.items():
            moves = trainable and method.stage(name) == method.trains_in
            self.hold(name, nn.Parameter(value, requires_grad=moves))

    @property
    def dropout(self) -> nn.Module | None:
        return self._modules.get(f"{self.method.name}_dropout")

    def params(self) -> dict[str, nn.Parameter]:
        """Parameter name → parameter."""
        return {name: self.held(name) for name in self.names}

    def _get_name(self) -> str:
        return type(self.method).__name__

    def extra_repr(self) -> str:
        shown = (f for f in fields(self.method) if getattr(self.method, f.name) != f.default or f.name == "r")
        return ", ".join(f"{f.name}={getattr(self.method, f.name)!r}" for f in shown)


class Graft(nn.Module):
    """What stands in the place of `base` while an adapter is on the model."""

    base: nn.Module
    label: str
    active: bool

    def __init__(self, base: nn.Module, label: str, own: nn.Module) -> None:
        super().__init__()
        # Plain entries, for nn.Module's checks on every assignment cost more than all the rest.
        self.__dict__.update(label=label, active=True, training=base.training)
        self._modules.update({"base": base, label: own})
        if not base.training:
            own.eval()

    @property
    def own(self) -> nn.Module:
        """What the adapter brought."""
        return self.get_submodule(self.label)

    @property
    def root(self) -> nn.Module:
        """The module under all grafts."""
        return self.base.root if isinstance(self.base, Graft) else self.base

    def __getattr__(self, name: str) -> Any:
        # Parents read attributes of the module they built (`weight.dtype`, `embedding_dim`).
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base")
            if base is None or name.startswith("__"):
                raise
            return getattr(base, name)


class WeightGraft(Graft):
    """A linear operation with a weight method at it."""

    site: Site

    def __init__(self, base: nn.Module, site: Site, label: str, theta: Theta) -> None:
        super().__init__(base, label, theta)
        self.__dict__["site"] = site

    @property
    def theta(self) -> Theta:
        """The adapter's parameters here."""
        theta = self._modules[self.label]
        assert isinstance(theta, Theta)
        return theta

    @property
    def method(self) -> WeightMethod:
        method = self.theta.method
        assert isinstance(method, WeightMethod)
        return method

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if not self.active:
            return self.base(*args, **kwargs)  # type: ignore[no-any-return]
        theta, method = self.theta, self.method
        op = operation(
            self.base, leaf(self.base), self.site, theta.dropout, args, kwargs, self.effective_base
        )
        formula = method.forward if op.plain else _by_definition(method)
        return op.like_base(formula(op, op.x, theta.params()))

    def effective_base(self) -> Tensor:
        """The (out, in) matrix of the base, with the grafts under this one folded in; float32 or wider."""
        return effective(self.base, self.site)


class StandIn(Graft):
    """A module of the base played by a copy with parameters of its own: heads and trained biases.

    `own` shares every parameter with the base but those that the adapter replaces (`replaces`).
    """

    def __init__(self, base: nn.Module, label: str, values: Mapping[str, Tensor], trainable: bool) -> None:
        super().__init__(
            base, label, clone(base.root if isinstance(base, Graft) else base, values, trainable)
        )
        self.replaces = tuple(values)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (self.own if self.active else self.base)(*args, **kwargs)


def clone(module: nn.Module, values: Mapping[str, Tensor], trainable: bool = False) -> nn.Module:
    """A shallow copy of `module` with parameters of its own for `values` (a Parameter is taken as it is)."""
    own = twin(module, {})
    own.__dict__["_parameters"] = dict(module._parameters)
    for name, value in values.items():
        given = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=trainable)
        own._parameters[name] = given
    return own


def twin(module: nn.Module, children: Mapping[str, Any]) -> nn.Module:
    """A shallow copy of `module` with these children in the place of its own of those names."""
    other = copy.copy(module)
    other.__dict__["_modules"] = {**module._modules, **children}
    return other


def leaf(module: nn.Module) -> nn.Module:
    """The module whose parameters are in force under the grafts."""
    if isinstance(module, StandIn) and module.active:
        return leaf(module.own)
    return leaf(module.base) if isinstance(module, Graft) else module


def effective(module: nn.Module, site: Site) -> Tensor:
    """The (out, in) matrix that the module, grafts and all, multiplies with; float32 or wider."""
    if isinstance(module, WeightGraft):
        below = module.effective_base()
        wide = {name: p.to(below.dtype) for name, p in module.theta.params().items()}
        return module.method.fold(below, wide) if module.active else below
    if isinstance(module, StandIn):
        return effective(module.own if module.active else module.base, site)
    weight = module.weight
    assert isinstance(weight, Tensor)
    return site.layout.matrix(weight).to(torch.promote_types(weight.dtype, torch.float32))


def _by_definition(method: WeightMethod) -> Callable[[Op, Tensor, Params], Tensor]:
    return lambda op, x, p: WeightMethod.forward(method, op, x, p)


__all__ = ["Factor", "Graft", "StandIn", "Theta", "WeightGraft", "clone", "effective", "leaf", "twin"]
