"""The live model that a graph is made of or compared with: loaded, its adapters on it or in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from peftsurgery.adapter import Adapter, bake
from peftsurgery.commands.fitting import common_task, labels
from peftsurgery.disk.locate import locate
from peftsurgery.errors import PlanError
from peftsurgery.live import pretrained, soft, surgery
from peftsurgery.live.merge import merge as merge_live
from peftsurgery.live.precision import convert
from peftsurgery.method import TokenMethod, WeightMethod
from peftsurgery.reading import AS_PEFT, Reading
from peftsurgery.tasks import task as task_named

if TYPE_CHECKING:
    from torch import nn

    from peftsurgery.graph.signature import Signature


@contextmanager
def operated(
    model: nn.Module | str | Path,
    adapters: list[Adapter],
    factored: bool,
    task: str | None,
    trust: bool,
    reading: Reading = AS_PEFT,
    dtype: torch.dtype | None = None,
) -> Iterator[nn.Module]:
    """The live model with the adapters merged or, factored, grafted; a live one is as before afterwards.

    Virtual tokens, bottlenecks and fusions have no weight to be merged into: they are grafted in either case,
    the tokens baked.

    Args:
        dtype: what its parameters are rounded to, once: what is merged is merged in float32 before. Their own
            by default.
    """
    _check_reading(adapters, reading)
    live = loaded(model, adapters, task, trust) if isinstance(model, str | Path) else model
    merged = [] if factored else [adapter for adapter in adapters if not stays(adapter)]
    undo: list[Callable[[], object]] = []
    try:
        if merged and dtype is not None and any(p.dtype != dtype for p in live.parameters()):
            widen = convert(live, torch.float32)  # so that what is merged is rounded once
            undo += [widen] if live is model else []
        if merged:
            undo.append(merge_live(live, *merged))
        for adapter in (adapter for adapter in adapters if adapter not in merged):
            way = reading if has_tokens(adapter) else AS_PEFT
            surgery.inject(live, bake(adapter), trainable=False, reading=way)
            undo.append(partial(surgery.remove, live, adapter.name))
        if dtype is not None:
            narrow = convert(live, dtype)
            undo += [narrow] if live is model else []
        yield live
    finally:
        for step in reversed(undo):
            step()


def stays(adapter: Adapter) -> bool:
    """Whether no merge absorbs it: virtual tokens, bottlenecks and their fusions."""
    return any(not isinstance(step.method, WeightMethod) for step in adapter.plan.steps)


def has_tokens(adapter: Adapter) -> bool:
    """Whether it puts virtual tokens before the words."""
    return any(isinstance(step.method, TokenMethod) for step in adapter.plan.steps)


def _check_reading(adapters: list[Adapter], reading: Reading) -> None:
    if reading != AS_PEFT and not any(has_tokens(adapter) for adapter in adapters):
        raise PlanError(
            "There are no virtual tokens to be read in another way. Name a prompt or a prefix (`--adapter DIR`), "
            "or leave the way out; nothing was written."
        )


def loaded(model: str | Path, adapters: list[Adapter], task: str | None, trust: bool) -> nn.Module:
    """The model of a directory, of the task and with the labels that the adapters bring."""
    return pretrained.load(
        locate(model),
        task=common_task(adapters, task),
        labels=labels(adapters),
        fresh=brought(adapters),
        trust_remote_code=trust,
    )


def brought(adapters: list[Adapter]) -> list[str]:
    """The modules that adapters bring whole, so that the checkpoint need not hold them."""
    return [name.rpartition(".")[0] for adapter in adapters for name in adapter.replaced]


def signature_of(live: nn.Module, task: str | None) -> Signature:
    """The model's inputs and outputs; its virtual tokens take positions from the longest input."""
    from peftsurgery.graph.signature import signature

    said = signature(live, task_named(task).name if task is not None else None)
    return replace(said, longest=max(1, said.longest - soft.count(live))) if said.longest else said
