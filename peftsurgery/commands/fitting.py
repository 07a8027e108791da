"""Fitting adapters to a checkpoint on disk: names, ties and heads, all from headers and a skeleton."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from peftsurgery.adapter import Adapter, rebased
from peftsurgery.disk.checkpoint import Checkpoint, load
from peftsurgery.errors import AdapterError, CheckpointError, listing
from peftsurgery.fold import folded, touches
from peftsurgery.live import anatomy, pretrained
from peftsurgery.live.sites import sites, ties
from peftsurgery.rename import Rename, renames
from peftsurgery.tasks import Task, task
from peftsurgery.ties import settle


@dataclass(frozen=True, slots=True)
class Fit:
    """How adapters and a checkpoint come together in the model that will be written.

    Args:
        skeleton: that model on the meta device.
        adapters: in its names.
        rename: from the checkpoint's names to its names.
        twins: tied names that the output must hold by itself → the name that holds their value now.
    """

    skeleton: nn.Module
    adapters: tuple[Adapter, ...]
    rename: Rename
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
        CheckpointError: the model would lack weights.
    """
    skeleton = pretrained.skeleton(
        checkpoint.path,
        task=common_task(adapters, task),
        labels=labels(adapters),
        trust_remote_code=trust_remote_code,
    )
    state = skeleton.state_dict()
    rename = best(checkpoint.tensors, state)
    fitted = [rebased(adapter, sites(skeleton), state)[0] for adapter in adapters]
    groups = ties(skeleton)
    stored = {rename(name): name for name in checkpoint.tensors}
    _complete(skeleton, checkpoint.path, groups, {*stored, *(n for a in fitted for n in a.replaced)})
    fitted, split = _settled(checkpoint, stored, groups, fitted, untie)
    twins = {twin: holder for group in split for twin, holder in _twins(group, stored).items()}
    return Fit(skeleton, tuple(fitted), rename, twins)


def best(names: Iterable[str], wanted: Mapping[str, object]) -> Rename:
    """The renaming of `names` that finds most of `wanted`; the plainest of equals."""
    known = list(names)
    return max(renames(known, wanted), key=lambda r: sum(r(name) in wanted for name in known))


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


def _complete(skeleton: nn.Module, path: Path, groups: Sequence[tuple[str, ...]], present: set[str]) -> None:
    tied = {name for group in groups if present & set(group) for name in group}
    lost = [name for name, _ in skeleton.named_parameters() if name not in present | tied]
    if lost:
        raise CheckpointError(
            f"{path} and the adapter lack {listing(lost)}, which {type(skeleton).__name__} needs. Take the checkpoint "
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
    new = dict(_folded_groups(checkpoint, stored, hit, adapters))
    split = settle(hit, new, untie=untie)
    dropped = {name for group in hit if group not in split for name in group if name not in stored}
    return [_without(adapter, dropped) for adapter in adapters], split


def _folded_groups(
    checkpoint: Checkpoint,
    stored: Mapping[str, str],
    hit: Sequence[tuple[str, ...]],
    adapters: Sequence[Adapter],
) -> Iterable[tuple[str, Tensor]]:
    for group in hit:
        value = load(checkpoint.tensors[next(stored[name] for name in group if name in stored)])
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
