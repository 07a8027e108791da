"""Merging in memory: fold everything first, then one `swap`, which undoes itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from peftsurgery.adapter import Adapter, check, rebased
from peftsurgery.errors import PlanError, listing
from peftsurgery.events import Listener, ignore
from peftsurgery.fold import folded, touches
from peftsurgery.live.chart import chart
from peftsurgery.live.grafts import clone
from peftsurgery.live.sites import everywhere, sites, ties, walk
from peftsurgery.live.swap import swap, tie_config
from peftsurgery.ties import settle


@dataclass(frozen=True, slots=True)
class Undo:
    """Called, it takes a merge back: the very modules that stood there before."""

    model: nn.Module
    modules: Mapping[str, nn.Module]
    tied: bool | None

    def __call__(self) -> None:
        swap(self.model, self.modules)
        tie_config(self.model, self.tied)


def merge(model: nn.Module, *given: Adapter, untie: bool = False, listen: Listener = ignore) -> Undo:
    """Absorb the adapters into the model's weights; what comes back undoes it.

    Every touched weight is folded before the first is put in place, each where it lies. The folded
    parameters are new ones: nobody else who holds the old weights sees them change.

    Args:
        untie: give a touched weight that several names share a copy of its own, and say so in the config.

    Raises:
        TiedSites: a touched weight has a twin that the adapter does not change in the same way.
        PlanError: the model still wears grafts.
        UnclaimedSites, MismatchedTensors, NonFiniteWeight, NotFoldable: nothing was changed.
    """
    if chart(model).records:
        worn = listing([record.name for record in chart(model).records])
        raise PlanError(
            f"The model still wears {worn}. Remove them first: `peftsurgery.remove(model, NAME)`."
        )
    known = dict(_parameters(model))
    adapters = [rebased(check(adapter), sites(model), known)[0] for adapter in given]
    touched = touches(*adapters)
    stream = ((name, parameter.detach()) for name, parameter in known.items() if name in touched)
    new = dict(folded(stream, *adapters, listen=listen))
    split = settle(ties(model), new, untie=untie)
    values = {name: nn.Parameter(value, known[name].requires_grad) for name, value in new.items()}
    values.update({twin: values[first] for twin, first in _shared(ties(model), new, split).items()})
    return Undo(model, _assign(model, values), tie_config(model, False) if split else None)


def _shared(
    groups: Sequence[tuple[str, ...]], new: Mapping[str, Tensor], split: Sequence[object]
) -> dict[str, str]:
    kept = [group for group in groups if group not in split and group[0] in new]
    return {twin: group[0] for group in kept for twin in group[1:]}


def _assign(model: nn.Module, values: Mapping[str, nn.Parameter]) -> dict[str, nn.Module]:
    by_module: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, value in values.items():
        place, _, leaf = name.rpartition(".")
        by_module[place][leaf] = value
    walked = list(walk(model))
    modules = dict(walked)
    return swap(model, everywhere({n: clone(modules[n], own) for n, own in by_module.items()}, walked))


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, module in walk(model):
        yield from ((f"{name}.{leaf}", p) for leaf, p in module._parameters.items() if p is not None)
