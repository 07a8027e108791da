"""Outputs on a live model: a layer whose sublayers hand their outputs to formulas, and whose code knows nothing of it.

The layer runs as a shallow copy of itself, made for the call, in which three modules of a sublayer are listened to:
the one whose input the layer adds to the output, the one that gives the output, and the norm behind the sum. The base
is never touched, nothing is remembered from one call to the next, and other grafts inside the layer work as ever.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftsurgery.adapter import Adapter
from peftsurgery.errors import PlanError
from peftsurgery.live.grafts import Factor, Graft, Theta, twin
from peftsurgery.live.stacks import Sublayer
from peftsurgery.live.sublayers import output_sites, present, stack_of, sublayers
from peftsurgery.method import Map, OutputMethod
from peftsurgery.planning import Plan, Step
from peftsurgery.site import Kind, Site


class OutputGraft(Graft):
    """A layer with output methods at its sublayers; those of several adapters work one after the other.

    Args:
        sublayers: all that the layer has.
        thetas: the parameters of one adapter by place.
    """

    sublayers: tuple[Sublayer, ...]
    places: tuple[str, ...]

    def __init__(
        self,
        base: nn.Module,
        label: str,
        sublayers: Sequence[Sublayer],
        thetas: Mapping[str, Theta],
    ) -> None:
        bench = Factor()
        for place, theta in thetas.items():
            bench.seat(place, theta)
        super().__init__(base, label, bench)
        self.__dict__.update(sublayers=tuple(sublayers), places=tuple(thetas))

    def theta(self, place: str) -> Theta:
        """The adapter's parameters at one sublayer."""
        theta = self.own.get_submodule(place)
        assert isinstance(theta, Theta)
        return theta

    def split(self, name: str) -> tuple[str, str]:
        """The place and the parameter that a name inside what the adapter brought means."""
        place = next(place for place in self.places if name.startswith(f"{place}."))
        return place, name.removeprefix(f"{place}.")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        worn: dict[str, list[Theta]] = defaultdict(list)
        floor: nn.Module = self
        while isinstance(floor, OutputGraft):
            for place in floor.places if floor.active else ():
                worn[place].insert(0, floor.theta(place))
            floor = floor.base
        return self._listened(floor, worn)(*args, **kwargs) if worn else floor(*args, **kwargs)

    def _listened(self, layer: nn.Module, worn: Mapping[str, Sequence[Theta]]) -> nn.Module:
        """The layer's copy for one call."""
        ears: dict[str, Ear] = defaultdict(Ear)
        spared = layer
        for sub in self.sublayers:
            if sub.dropout:
                ears[sub.output].answers.append(_dropping(layer, sub.dropout))
                spared = _sparing(spared, sub.dropout)
            if sub.place in worn:
                _listen(ears, sub, layer, worn[sub.place])
        return with_ears(spared, ears)


class Ear:
    """A module of the copy: what hears its input, and what answers in its place."""

    __slots__ = ("answers", "hears", "module")

    def __init__(self) -> None:
        self.module: Any = None
        self.hears: list[Callable[[Tensor], object]] = []
        self.answers: list[Map] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for hear in self.hears:
            hear(args[0] if args else kwargs["hidden_states"])
        out = self.module(*args, **kwargs)
        first = out[0] if isinstance(out, tuple) else out
        for answer in self.answers:
            first = answer(first)
        return (first, *out[1:]) if isinstance(out, tuple) else first

    def __getattr__(self, name: str) -> Any:
        # Layers read attributes of the modules that they built; what Python looks for itself is not meant.
        if name.startswith("__") or name in self.__slots__:
            raise AttributeError(name)
        return getattr(self.module, name)


class Seat:
    """One sublayer during one call; `is_open` from its entry to its output."""

    __slots__ = ("is_open", "norm", "residual", "result", "thetas")

    def __init__(self, thetas: Sequence[Theta], norm: nn.Module | None) -> None:
        self.thetas, self.norm, self.is_open = thetas, norm, False
        self.residual: Tensor | None = None
        self.result: Tensor | None = None

    @property
    def is_final(self) -> bool:
        """Whether the outermost adapter leaves out what the layer does with the output."""
        return _method(self.thetas[-1]).is_final

    def enter(self, x: Tensor) -> None:
        """Hear what the layer will add to the output."""
        self.residual, self.is_open = x, True

    def join(self, y: Tensor) -> Tensor:
        """Hear the sublayer that a parallel layer adds too, in front of this one."""
        assert self.residual is not None
        self.residual = self.residual + y
        return y

    def leave(self, y: Tensor) -> Tensor:
        """What goes on in the place of the sublayer's output; another one's output goes on as it is."""
        if not self.is_open:
            return y
        assert self.residual is not None
        self.is_open = False
        for theta in self.thetas:
            y = _applied(theta, y, self.residual, self.norm)
        self.result = y
        return y - self.residual if self.is_final and self.norm is None else y

    def close(self, normed: Tensor) -> Tensor:
        """What goes on in the place of the norm's output, where the last adapter is final."""
        if self.result is None or self.result.numel() != normed.numel():
            raise PlanError(
                "An adapter without `original_ln_after` does not work where the feed-forward is computed in chunks. "
                "Set `model.config.chunk_size_feed_forward = 0` before the model is made."
            )
        return self.result.view_as(normed)  # OPT's feed-forward works on a flat list of words


def _listen(ears: Mapping[str, Ear], sub: Sublayer, layer: nn.Module, thetas: Sequence[Theta]) -> None:
    seat = Seat(thetas, layer.get_submodule(sub.norm) if sub.norm else None)
    ears[sub.entry].hears.append(seat.enter)
    if sub.beside:
        ears[sub.beside].answers.append(seat.join)
    ears[sub.output].answers.append(seat.leave)
    if seat.is_final and sub.norm:
        ears[sub.norm].answers.append(seat.close)


def _applied(theta: Theta, y: Tensor, residual: Tensor, norm: nn.Module | None) -> Tensor:
    """The formula in the dtype of its parameters, or a wider one; what it gives is of the dtype of `y`."""
    params = theta.params()
    given = torch.promote_types(y.dtype, residual.dtype)
    wide = torch.promote_types(given, next(iter(params.values())).dtype)
    own = None if norm is None else lambda x: norm(x.to(given)).to(wide)
    out = _method(theta).forward(y.to(wide), residual.to(wide), own, params, theta.training)
    return out.to(y.dtype)


def _method(theta: Theta) -> OutputMethod:
    method = theta.method
    assert isinstance(method, OutputMethod)
    return method


def with_ears(module: nn.Module, ears: Mapping[str, Ear]) -> nn.Module:
    """A shallow copy of the module in which each ear stands at its name, in front of what stands there."""
    if isinstance(module, Graft):
        return twin(module, {"base": with_ears(module.base, ears)})
    below: dict[str, dict[str, Ear]] = defaultdict(dict)
    for path, ear in ears.items():
        head, _, rest = path.partition(".")
        below[head][rest] = ear
    return twin(module, {head: _heard(module.get_submodule(head), inner) for head, inner in below.items()})


def _heard(child: nn.Module, ears: dict[str, Ear]) -> Any:
    own = ears.pop("", None)
    inside = with_ears(child, ears) if ears else child
    if own is None:
        return inside
    own.module = inside
    return own


def _dropping(layer: nn.Module, path: str) -> Map:
    """What the layer drops, with the attribute of that path."""
    parent, _, leaf = path.rpartition(".")
    owner = layer.get_submodule(parent)
    drop: Any = getattr(owner, leaf)
    return drop if isinstance(drop, nn.Module) else lambda y: nn.functional.dropout(y, drop, owner.training)


def _sparing(module: nn.Module, path: str) -> nn.Module:
    """A shallow copy of the module that does not drop once more with the attribute of that path."""
    if isinstance(module, Graft):
        return twin(module, {"base": _sparing(module.base, path)})
    head, _, rest = path.partition(".")
    if rest:
        return twin(module, {head: _sparing(module.get_submodule(head), rest)})
    if head in module._modules:
        return twin(module, {head: nn.Identity()})
    spared = twin(module, {})
    spared.__dict__[head] = 0.0
    return spared


def plan_sites(plan: Plan) -> list[str]:
    """The names of a plan's outputs."""
    return [site.name for site in plan.sites if site.kind is Kind.OUTPUT]


def offered(model: nn.Module, plan: Plan) -> tuple[Site, ...]:
    """The model's outputs; none for a plan that has none.

    Raises:
        UnsupportedSite: where they are is not known.
    """
    return output_sites(model) if plan_sites(plan) else ()


def layers(model: nn.Module, plan: Plan) -> list[str]:
    """The names of the layers that wear the outputs of a plan."""
    known = sublayers(model) if plan_sites(plan) else {}
    return list(dict.fromkeys(known[name][0] for name in plan_sites(plan)))


def grafts(
    model: nn.Module, adapter: Adapter, modules: Mapping[str, nn.Module], trainable: bool
) -> dict[str, Graft]:
    """The grafts of an adapter's outputs by the name of the layer that each stands at.

    Args:
        modules: what stands at each name.
    """
    wanted: dict[str, dict[str, Theta]] = defaultdict(dict)
    known = sublayers(model) if plan_sites(adapter.plan) else {}
    for step in adapter.plan.steps:
        if step.site.kind is Kind.OUTPUT:
            layer, sub = known[step.site.name]
            wanted[layer][sub.place] = _theta(modules[layer], step, adapter, trainable)
    made: dict[str, Graft] = {}
    for layer, thetas in wanted.items():
        subs = present(stack_of(model), modules, layer)
        made[layer] = OutputGraft(modules[layer], adapter.name, subs, thetas)
    return made


def thetas(worn: Mapping[str, Sequence[Graft]]) -> dict[str, Theta]:
    """By the name of every output site, the parameters at it, of the grafts of one adapter by place."""
    found = ((layer, graft) for layer, own in worn.items() for graft in own if isinstance(graft, OutputGraft))
    return {f"{layer}.{place}": graft.theta(place) for layer, graft in found for place in graft.places}


def _theta(layer: nn.Module, step: Step, adapter: Adapter, trainable: bool) -> Theta:
    near = next(p for p in layer.parameters() if p.is_floating_point())
    dtype = torch.promote_types(near.dtype, torch.float32)
    params = {name: p.to(near.device, dtype) for name, p in adapter.params[step.site.name].items()}
    return Theta(step.method, params, 0.0, trainable)
