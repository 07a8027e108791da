"""An adapter is a plan with weights: saved, loaded, rebased, scaled, baked, folded."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from peftsurgery.errors import MismatchedTensors, NonFiniteWeight, UnclaimedSites, listing, nearest
from peftsurgery.lazy import outlined
from peftsurgery.method import Method, Params, TokenMethod
from peftsurgery.planning import Plan, Step
from peftsurgery.reading import AS_PEFT, Reading
from peftsurgery.rename import Rename, renames
from peftsurgery.site import Kind, Site


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
        model_type: the architecture that it was made for, in the word of `config.json`, where known.
        reading: how virtual tokens were trained to be read.
    """

    plan: Plan
    params: Mapping[str, Params]
    name: str = "default"
    shared: Params = field(default_factory=dict)
    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    task_type: str | None = None
    base: str | None = None
    model_type: str | None = None
    reading: Reading = AS_PEFT

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor under its full name, `<site>.<parameter>`."""
        for site, params in self.params.items():
            yield from ((f"{site}.{name}", tensor) for name, tensor in params.items())
        yield from self.shared.items()
        yield from self.replaced.items()

    def held(self) -> Adapter:
        """The adapter with every tensor in memory."""
        return replace(self, params={site: dict(params) for site, params in self.params.items()})

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


def fingerprint(*adapters: Adapter) -> str:
    """A SHA-256 of what the adapters compute: their methods, sites and tensors."""
    found = hashlib.sha256()
    for adapter in adapters:
        found.update(repr(sorted(map(repr, adapter.plan.steps))).encode())
        homes = {f"{site}.{name}": (held, name) for site, held in adapter.params.items() for name in held}
        homes |= {name: (held, name) for held in (adapter.shared, adapter.replaced) for name in held}
        for name, (held, word) in sorted(homes.items()):
            tensor = held[word]
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def bake(adapter: Adapter) -> Adapter:
    """The adapter with every token method evaluated: mere tokens, and no encoder. A baked one is itself.

    The tokens are bit for bit those that the encoder gives in evaluation mode, where it is baked.
    """
    method = next((s.method for s in adapter.plan.steps if isinstance(s.method, TokenMethod)), None)
    if method is None or method.baked() is method:
        return adapter
    simpler, table = method.bake(adapter.shared)
    steps = tuple(Step(s.site, simpler if s.method == method else s.method) for s in adapter.plan.steps)
    rest = {
        k: v for k, v in adapter.shared.items() if k not in method.shared_shapes(_stands(adapter, method))
    }
    return replace(adapter, plan=replace(adapter.plan, steps=steps), shared={**rest, **table})


def check(adapter: Adapter) -> Adapter:
    """The adapter itself, when every tensor is announced, has its announced shape and is finite.

    Raises:
        MismatchedTensors: a parameter is missing, unexpected or misshapen.
        NonFiniteWeight: a tensor holds a NaN or an infinity.
    """
    for step in adapter.plan.steps:
        _check_site(step, adapter.params.get(step.site.name, {}))
    _check_shared(adapter)
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
    `BertModel` (`encoder…`), and the other way round. Where tokens enter is told by kind and order:
    PEFT's files do not name such places.

    Args:
        sites: what the base offers, places for tokens included where the adapter has some.
        names: the tensor names that the base holds (for what the adapter replaces).

    Raises:
        UnclaimedSites: a site of the adapter that the base lacks.
        MismatchedTensors: the shapes do not fit: another base.
    """
    every = list(sites)
    offered = {site.name: site for site in every if site.kind.has_name}
    wanted = [site.name for site in adapter.plan.sites if site.kind.has_name]
    rename = max(renames(wanted, offered), key=lambda r: sum(r(name) in offered for name in wanted))
    _claim(adapter, [name for name in wanted if rename(name) not in offered], offered)
    seats = {**_seats(adapter, every, Kind.TOKENS), **_seats(adapter, every, Kind.ATTENTION)}
    landed = {site: seats.get(site) or offered[rename(site.name)] for site in adapter.plan.sites}
    steps = tuple(Step(landed[step.site], step.method) for step in adapter.plan.steps)
    rebased = replace(
        adapter,
        plan=replace(adapter.plan, steps=steps),
        params={to.name: adapter.params.get(site.name, {}) for site, to in landed.items()},
        replaced={_landing(name, rename, names): tensor for name, tensor in adapter.replaced.items()},
    )
    for step in rebased.plan.steps:
        _check_site(step, rebased.params[step.site.name])
    _check_shared(rebased)
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


def _seats(adapter: Adapter, offered: Iterable[Site], kind: Kind) -> dict[Site, Site]:
    """Where the tokens of this kind enter in the base, for every place where they enter in the adapter."""
    mine = [site for site in adapter.plan.sites if site.kind is kind]
    there = [site for site in offered if site.kind is kind]
    named = {site.name: site for site in there}
    if all(site.name in named for site in mine):
        return {site: named[site.name] for site in mine}
    if len(mine) == len(there):
        return dict(zip(mine, there, strict=True))
    places = "word embeddings" if kind is Kind.TOKENS else "attention layers"
    raise UnclaimedSites(
        f"Adapter {adapter.name!r} has tokens for {len(mine)} {places}, and the base offers {len(there)}. "
        f"Take the base that it was trained on{f' ({adapter.base})' if adapter.base else ''}; "
        "nothing was changed.",
        sites=[site.name for site in mine],
        nearest=[site.name for site in there[:3]],
    )


def _claim(adapter: Adapter, lost: Sequence[str], offered: Mapping[str, Site]) -> None:
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


def _stands(adapter: Adapter, method: Method) -> list[Site]:
    return [step.site for step in adapter.plan.steps if step.method == method]


def _check_site(step: Step, params: Params) -> None:
    _check_params(f"{step.site.name}.", str(step.site), step.method.shapes(step.site), params)


def _check_shared(adapter: Adapter) -> None:
    methods = dict.fromkeys(step.method for step in adapter.plan.steps)
    announced: dict[str, tuple[int, ...]] = {}
    for method in methods:
        announced |= method.shared_shapes(_stands(adapter, method))
    taker = f"{' and '.join(method.name for method in methods)} at {len(adapter.plan.steps)} sites"
    _check_params("", taker, announced, adapter.shared)


def _check_params(prefix: str, taker: str, announced: Mapping[str, tuple[int, ...]], params: Params) -> None:
    missing, unexpected = sorted(announced.keys() - params.keys()), sorted(params.keys() - announced.keys())
    if missing or unexpected:
        lacks = f"lacks {listing(missing)}" if missing else ""
        holds = f"holds {listing(unexpected)} besides" if unexpected else ""
        raise MismatchedTensors(
            f"{taker} takes {listing(sorted(announced)) or 'no shared tensor'}, and the adapter "
            f"{' and '.join(filter(None, (lacks, holds)))}. "
            "Its files are incomplete, or belong to another method or base; nothing was changed.",
            missing=[f"{prefix}{name}" for name in missing],
            unexpected=[f"{prefix}{name}" for name in unexpected],
        )
    known = outlined(params)
    for name, shape in announced.items():
        if tuple(known[name].shape) != shape:
            raise MismatchedTensors(
                f"{prefix + name!r} has shape {tuple(known[name].shape)}, and {taker} takes {shape}. "
                "The adapter was trained on another base; nothing was changed.",
                unexpected=[f"{prefix}{name}"],
            )
