"""An adapter is a plan with weights: saved, loaded, rebased, scaled, folded."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from peftsurgery.errors import MismatchedTensors, NonFiniteWeight, UnclaimedSites, listing, nearest
from peftsurgery.method import Params
from peftsurgery.planning import Plan, Step
from peftsurgery.rename import Rename, renames
from peftsurgery.site import Site


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """A plan with weights.

    Args:
        plan: which method stands at which site.
        params: for every site, the method's parameters by name (`lora_A.weight` → (r, in)).
        name: what the adapter is called on a model.
        shared: parameters that several sites share (prefix tables and the like).
        replaced: tensors of the base that the adapter replaces whole: heads (`modules_to_save`) and
            trained biases, under their names in the model.
        task_type: PEFT's word for the task (`SEQ_CLS`, `CAUSAL_LM`, …), where known.
        base: `base_model_name_or_path`, where known.
    """

    plan: Plan
    params: Mapping[str, Params]
    name: str = "default"
    shared: Params = field(default_factory=dict)
    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    task_type: str | None = None
    base: str | None = None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor under its full name, `<site>.<parameter>`."""
        for site, params in self.params.items():
            yield from ((f"{site}.{name}", tensor) for name, tensor in params.items())
        yield from self.shared.items()
        yield from self.replaced.items()

    @property
    def num_parameters(self) -> int:
        """How many numbers it holds."""
        return sum(tensor.numel() for _, tensor in self.tensors())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Adapter):
            return NotImplemented
        mine, theirs = dict(self.tensors()), dict(other.tensors())
        steps, others = frozenset(self.plan.steps), frozenset(other.plan.steps)  # their order means nothing
        return (
            (steps, self.name, self.task_type) == (others, other.name, other.task_type)
            and mine.keys() == theirs.keys()
            and all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
        )

    __hash__ = None  # type: ignore[assignment]  # it holds tensors

    def __str__(self) -> str:
        heads = f", replaces {listing(tuple(self.replaced))}" if self.replaced else ""
        return f"{self.name}: {self.num_parameters:,} parameters at {len(self.plan.steps)} sites{heads}"


def scale(adapter: Adapter, weight: float) -> Adapter:
    """The adapter whose effect on every site is `weight` times as large; heads stay as they are.

    Raises:
        NotFoldable: its method has no scale.
    """
    steps = tuple(Step(step.site, step.method.scaled(weight)) for step in adapter.plan.steps)
    return replace(adapter, plan=replace(adapter.plan, steps=steps))


def check(adapter: Adapter) -> Adapter:
    """The adapter itself, when every tensor is announced, has its announced shape and is finite.

    Raises:
        MismatchedTensors: a parameter is missing, unexpected or misshapen.
        NonFiniteWeight: a tensor holds a NaN or an infinity.
    """
    for step in adapter.plan.steps:
        _check_site(step, adapter.params.get(step.site.name, {}))
    for name, tensor in adapter.tensors():
        if not tensor.is_meta and not torch.isfinite(tensor).all():
            raise NonFiniteWeight(
                f"{name!r} of adapter {adapter.name!r} holds NaN or infinite values. "
                "Train it again or take an earlier checkpoint; nothing was changed.",
                tensor=name,
            )
    return adapter


def rebased(adapter: Adapter, sites: Iterable[Site], names: Collection[str] = ()) -> tuple[Adapter, Rename]:
    """The adapter said in the base's own names, kinds and layouts, and the renaming that took it there.

    An adapter trained on `BertForSequenceClassification` (`bert.encoder…`) fits a base saved as
    `BertModel` (`encoder…`), and the other way round.

    Args:
        sites: what the base offers.
        names: the tensor names that the base holds (for what the adapter replaces).

    Raises:
        UnclaimedSites: a site of the adapter that the base lacks.
        MismatchedTensors: the shapes do not fit: another base.
    """
    offered = {site.name: site for site in sites}
    wanted = [site.name for site in adapter.plan.sites]
    rename = max(renames(wanted, offered), key=lambda r: sum(r(name) in offered for name in wanted))
    _claim(adapter, rename, offered)
    steps = tuple(Step(offered[rename(step.site.name)], step.method) for step in adapter.plan.steps)
    rebased = replace(
        adapter,
        plan=replace(adapter.plan, steps=steps),
        params={rename(site): params for site, params in adapter.params.items()},
        replaced={_landing(name, rename, names): tensor for name, tensor in adapter.replaced.items()},
    )
    for step in rebased.plan.steps:
        _check_site(step, rebased.params[step.site.name])
    return rebased, rename


def moved(adapter: Adapter, names: Mapping[str, str]) -> Adapter:
    """The adapter for a place that calls some tensors otherwise: `names` gives the new name of a tensor."""

    def site(name: str) -> str:
        return names.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")

    steps = tuple(Step(replace(s.site, name=site(s.site.name)), s.method) for s in adapter.plan.steps)
    return replace(
        adapter,
        plan=replace(adapter.plan, steps=steps),
        params={site(name): params for name, params in adapter.params.items()},
        replaced={names.get(name, name): tensor for name, tensor in adapter.replaced.items()},
    )


def _landing(name: str, rename: Rename, names: Collection[str]) -> str:
    moved = rename(name)
    return moved if moved in names or not rename.adds else name


def _claim(adapter: Adapter, rename: Rename, offered: Mapping[str, Site]) -> None:
    lost = [site.name for site in adapter.plan.sites if rename(site.name) not in offered]
    if not lost:
        return
    near = nearest(lost[0], offered)
    raise UnclaimedSites(
        f"{len(lost)} of {len(adapter.plan.steps)} sites of adapter {adapter.name!r} are not in the base: "
        f"{listing(lost)}. Nearest there: {listing(near) or 'nothing'}. Take the base that the adapter was "
        f"trained on{f' ({adapter.base})' if adapter.base else ''}; nothing was changed.",
        sites=lost,
        nearest=near,
    )


def _check_site(step: Step, params: Params) -> None:
    announced = step.method.shapes(step.site)
    missing, unexpected = sorted(announced.keys() - params.keys()), sorted(params.keys() - announced.keys())
    if missing or unexpected:
        raise MismatchedTensors(
            f"{step.site} takes {listing(sorted(announced))} and the adapter has {listing(sorted(params)) or 'none'}. "
            "Its files are incomplete, or belong to another method or base; nothing was changed.",
            missing=[f"{step.site.name}.{name}" for name in missing],
            unexpected=[f"{step.site.name}.{name}" for name in unexpected],
        )
    for name, shape in announced.items():
        if tuple(params[name].shape) != shape:
            raise MismatchedTensors(
                f"'{step.site.name}.{name}' has shape {tuple(params[name].shape)}, and {step.site} takes {shape}. "
                "The adapter was trained on another base; nothing was changed.",
                unexpected=[f"{step.site.name}.{name}"],
            )
