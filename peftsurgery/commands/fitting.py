"""Fitting adapters to a checkpoint on disk: names, ties and heads, all from headers and a blueprint."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from peftsurgery.adapter import Adapter, moved, rebased
from peftsurgery.commands.blueprints import blueprint
from peftsurgery.commands.companions import refuse_quantised
from peftsurgery.disk.checkpoint import Checkpoint, Stored, load
from peftsurgery.errors import AdapterError, CheckpointError, NotFoldable, listing
from peftsurgery.fold import folded, touches
from peftsurgery.live import anatomy
from peftsurgery.live.blueprint import Blueprint
from peftsurgery.live.pretrained import Loading
from peftsurgery.rename import renames
from peftsurgery.tasks import Task, task
from peftsurgery.ties import settle


@dataclass(frozen=True, slots=True)
class Fit:
    """How adapters and a checkpoint come together in the model that will be written.

    Args:
        blueprint: that model.
        adapters: in the names of the output.
        rename: from the checkpoint's names to the output's.
        twins: tied names that the output must hold by itself → the name that holds their value now.
    """

    blueprint: Blueprint
    adapters: tuple[Adapter, ...]
    rename: Callable[[str], str]
    twins: Mapping[str, str]


def fit(
    checkpoint: Checkpoint,
    adapters: Sequence[Adapter],
    *,
    task: str | None,
    untie: bool,
    trust_remote_code: bool,
) -> Fit:
    """Fit adapters to a checkpoint, reading headers only (and the weights of tied groups that are folded).

    Raises:
        UnclaimedSites, MismatchedTensors: an adapter was trained on another base.
        TiedSites: a tied weight would be folded behind its twin's back.
        NotFoldable: a weight that transformers assembles from several tensors.
        CheckpointError: the model would lack weights.
        PlanError: the base is quantised.
    """
    refuse_quantised(checkpoint.path)
    drawn = blueprint(
        checkpoint,
        task=common_task(adapters, task),
        labels=labels(adapters),
        trust_remote_code=trust_remote_code,
    )
    state, loading, groups = frozenset(drawn.state), drawn.loading, drawn.ties
    fitted = [rebased(adapter, drawn.sites, state)[0] for adapter in adapters]
    _refuse_assembled(fitted, loading)
    stored = {live: name for name, live in loading.names.items()}
    _complete(drawn, checkpoint.path, {*stored, *(n for a in fitted for n in a.replaced)})
    fitted, split = _settled(checkpoint, stored, groups, fitted, untie)
    twins = {twin: holder for group in split for twin, holder in _twins(group, stored).items()}
    written = _written(loading, checkpoint.tensors, state)
    spelled = {live: written(name) for live, name in stored.items()}
    return Fit(
        drawn,
        tuple(moved(adapter, spelled) for adapter in fitted),
        written,
        {twin: spelled[holder] for twin, holder in twins.items()},
    )


def _written(loading: Loading, names: Iterable[str], state: Collection[str]) -> Callable[[str], str]:
    """What the output calls a tensor: what the base calls it, with the prefix that the output's class needs.

    Old spellings become today's; a model whose names transformers maps in other ways keeps its own.
    """
    known = list(names)
    prefix = max(renames(known, state), key=lambda r: sum(r(name) in state for name in known))

    def written(name: str) -> str:
        legacy = name.endswith((".gamma", ".beta"))
        return loading.names[name] if legacy and loading.names[name] in state else prefix(name)

    return written


def _refuse_assembled(adapters: Sequence[Adapter], loading: Loading) -> None:
    hit = sorted(set(touches(*adapters)) & loading.assembled)
    if hit:
        raise NotFoldable(
            f"{listing(hit)} is not in the checkpoint as such: transformers assembles it on loading. Load the model, "
            "merge it live (`peftsurgery.merge(model, adapter)`) and save it; nothing was written."
        )


def common_task(adapters: Sequence[Adapter], word: str | None) -> Task | None:
    """The task that was asked for, or the one that the adapters were trained on.

    Raises:
        AdapterError: they were trained on different ones.
    """
    if word is not None:
        return task(word)
    words = sorted({adapter.task_type for adapter in adapters if adapter.task_type})
    if len(words) > 1:
        raise AdapterError(
            f"The adapters were trained for different tasks: {listing(words)}. Choose with `--task`."
        )
    return task(words[0]) if words else None


def labels(adapters: Sequence[Adapter]) -> int | None:
    """How many classes the heads that the adapters bring have."""
    heads = [tensor for adapter in adapters for tensor in anatomy.label_weights(adapter.replaced)]
    return heads[0].shape[0] if heads else None


def _complete(drawn: Blueprint, path: Path, present: set[str]) -> None:
    tied = {name for group in drawn.ties if present & set(group) for name in group}
    lost = [name for name in drawn.parameters if name not in present | tied]
    if lost:
        raise CheckpointError(
            f"{path} and the adapter lack {listing(lost)}, which {drawn.architecture} needs. Take the checkpoint "
            "or the adapter that holds them, or another `--task`; nothing was written."
        )


def _settled(
    checkpoint: Checkpoint,
    stored: Mapping[str, str],
    groups: Sequence[tuple[str, ...]],
    adapters: Sequence[Adapter],
    untie: bool,
) -> tuple[list[Adapter], list[tuple[str, ...]]]:
    """The adapters without the sites of twins that stay tied, and the groups that are split."""
    touched = touches(*adapters).keys()
    hit = [group for group in groups if any(name in touched for name in group)]
    held = {live: checkpoint.tensors[name] for live, name in stored.items()}
    new = dict(folded_groups(held, hit, adapters))
    split = settle(hit, new, untie=untie)
    dropped = {name for group in hit if group not in split for name in group if name not in stored}
    return [_without(adapter, dropped) for adapter in adapters], split


def folded_groups(
    held: Mapping[str, Stored | Tensor],
    hit: Sequence[tuple[str, ...]],
    adapters: Sequence[Adapter],
) -> Iterable[tuple[str, Tensor]]:
    """What becomes of every name of these groups of tied tensors that the adapters change, for `settle`."""
    for group in hit:
        origin = next(held[name] for name in group if name in held)
        value = load(origin) if isinstance(origin, Stored) else origin
        touched = [name for name in group if name in touches(*adapters)]
        alone = [_only(adapter, set(touched)) for adapter in adapters]
        yield from folded(((name, value) for name in touched), *alone)


def _twins(group: Sequence[str], stored: Mapping[str, str]) -> dict[str, str]:
    holder = next(name for name in group if name in stored)
    return {name: holder for name in group if name not in stored}


def _only(adapter: Adapter, names: set[str]) -> Adapter:
    rest = {step.site.weight for step in adapter.plan.steps} - names
    kept = {name: value for name, value in adapter.replaced.items() if name in names}
    return replace(_without(adapter, rest), replaced=kept)


def _without(adapter: Adapter, names: set[str]) -> Adapter:
    steps = tuple(step for step in adapter.plan.steps if step.site.weight not in names)
    return replace(adapter, plan=replace(adapter.plan, steps=steps))
