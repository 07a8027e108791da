"""Fusing trained adapters: a fusion made of them, on the model that they were trained for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from peftsurgery.adapter import Adapter, check, rebased
from peftsurgery.commands.adapter_files import Adapters, gather
from peftsurgery.errors import PlanError, listing
from peftsurgery.live.sublayers import output_sites
from peftsurgery.method import Method
from peftsurgery.methods import AdapterFusion, Bottleneck
from peftsurgery.planning import Step
from peftsurgery.site import Site

if TYPE_CHECKING:
    from torch import nn


def members(model: nn.Module, method: Method, adapters: Adapters, allow_pickle: bool) -> list[Adapter]:
    """The adapters without their heads, in the names of the model, ready to be fused by `method`; none of none.

    Raises:
        PlanError: the method is no fusion, an adapter is no bottleneck, or two have one name or not the same places.
        UnclaimedSites, MismatchedTensors: one was trained on another base.
    """
    if not adapters:
        return []
    if not isinstance(method, AdapterFusion):
        raise PlanError(f"{method.name} fuses no adapters. Leave them out, or take `AdapterFusion()`.")
    offered = output_sites(model)
    fitted = []
    for given in gather(adapters, allow_pickle=allow_pickle):
        if not all(isinstance(step.method, Bottleneck) for step in given.plan.steps):
            raise PlanError(f"{given.name!r} is no bottleneck adapter, and a fusion fuses nothing else.")
        fitted.append(rebased(check(replace(given, replaced={})), offered)[0])
    _check_names([adapter.name for adapter in fitted])
    first = {site.name for site in fitted[0].plan.sites}
    for other in fitted[1:]:
        lone = sorted(first ^ {site.name for site in other.plan.sites})
        if lone:
            raise PlanError(
                f"{fitted[0].name!r} and {other.name!r} have not the same places: only one of them is at "
                f"{listing(lone)}. Fuse adapters of one configuration; nothing was changed."
            )
    return fitted


def _check_names(names: Sequence[str]) -> None:
    again = next((name for name in names if names.count(name) > 1), None)
    if again is not None:
        raise PlanError(
            f"Two of the adapters are named {again!r}, and each needs a name of its own. Make them with `--name`, or "
            "load one under another, `load_adapter(DIR, name='other')`; nothing was changed."
        )


def steps(method: Method, adapters: Sequence[Adapter]) -> dict[str, Step]:
    """By the name of every place that the adapters have, their fusion there."""
    assert isinstance(method, AdapterFusion)
    return {site.name: Step(site, _at(site, method, adapters)) for site in adapters[0].plan.sites}


def filled(fusion: Adapter, adapters: Sequence[Adapter]) -> Adapter:
    """A fusion with the trained parameters of its members in the place of fresh ones; copies."""
    params = {
        site: {
            **own,
            **{f"{a.name}.{key}": value.clone() for a in adapters for key, value in a.params[site].items()},
        }
        for site, own in fusion.params.items()
    }
    return replace(fusion, params=params)


def _at(site: Site, method: AdapterFusion, adapters: Sequence[Adapter]) -> AdapterFusion:
    found = [(a.name, next(s.method for s in a.plan.steps if s.site == site)) for a in adapters]
    return replace(method, members=tuple((name, one) for name, one in found if isinstance(one, Bottleneck)))
