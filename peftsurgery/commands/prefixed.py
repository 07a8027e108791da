"""Soft prompts of a decoder: whatever the method, constant keys and values before the words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from peftsurgery.commands.operating import signature_of
from peftsurgery.errors import ParityError, PlanError
from peftsurgery.live.constant import keys_and_values, silenced
from peftsurgery.tasks import task as task_named
from peftsurgery.tasks import task_of

if TYPE_CHECKING:
    from peftsurgery.graph.signature import Signature

BAKED, FILE = "baked", "file"
KEPT = "prefix.safetensors"
"""The file that a session feeds to the graph of the base."""


@dataclass(frozen=True, slots=True)
class Plain:
    """The signature of a model without its soft prompts.

    Args:
        prefix: what they are to it, where a graph of it holds them.
        apart: the same, where a graph of it is fed them.
    """

    signature: Signature
    prefix: Mapping[str, Tensor]
    apart: Mapping[str, Tensor]


@contextmanager
def plain(
    live: nn.Module,
    task: str | None,
    prefix: Mapping[str, Tensor] | None = None,
    *,
    form: str = BAKED,
) -> Iterator[Plain]:
    """For text generation the model without virtual tokens, and these as keys and values; any other as it is.

    Args:
        prefix: the keys and values, where they are known, or the model has no weights to compute them with.

    Raises:
        PlanError: the keys and values are to be fed to a model that takes none.
    """
    if not generates(live, task):
        if form == FILE:
            raise PlanError(
                f"{type(live).__name__} is no decoder, and only a decoder's soft prompt can be fed to it from a file. "
                "Leave out `--prefix file`, and it is baked in; nothing was written."
            )
        yield Plain(signature_of(live, task), {}, {})
        return
    found = computed(live) if prefix is None else dict(prefix)
    with silenced(live):
        said = signature_of(live, task)
        yield Plain(_shortened(said, found), found, {}) if form == BAKED else Plain(said, {}, found)


def computed(live: nn.Module) -> dict[str, Tensor]:
    """The keys and values of a decoder's virtual tokens, proven on a row of words; none where it has none.

    Raises:
        ParityError: the model behind its keys and values is not the model with its virtual tokens.
    """
    from peftsurgery.graph.posture import evaluating

    with evaluating(live):
        found = keys_and_values(live)
        if found:
            expected = _row(live, {})
            with silenced(live):
                _check(_row(live, found), expected, next(iter(found.values())).dtype)
    return found


def generates(live: nn.Module, task: str | None) -> bool:
    """Whether the model is exported with a cache."""
    said = task_of(type(live).__name__) if task is None else task_named(task)
    return said is not None and said.name == "text-generation"


def _shortened(said: Signature, prefix: Mapping[str, Tensor]) -> Signature:
    from peftsurgery.graph import cache

    return replace(said, longest=max(1, said.longest - cache.count_of(prefix))) if said.longest else said


def _row(live: nn.Module, prefix: Mapping[str, Tensor]) -> Tensor:
    """The logits of one row of words."""
    from peftsurgery.graph import cache
    from peftsurgery.graph.signature import call

    ids = torch.arange(1, 6, device=next(live.parameters()).device)[None]
    empty = {name.replace(cache.PREFIX, cache.PAST): t[None, :, :0] for name, t in prefix.items()}
    feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **empty}
    logits: Tensor = call(live, cache.behind(prefix, feeds))["logits"]
    return logits[:, -5:].float()


def _check(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    from peftsurgery.graph.parity import tolerance

    apart, allowed = float((found - expected).abs().max()), tolerance(dtype).absolute
    if apart > allowed * max(1.0, float(expected.abs().max())):
        raise ParityError(
            f"Behind its keys and values the model gives logits that are {apart:.3g} off those with its virtual "
            "tokens. Report the model's class; nothing was written.",
            max_abs_diff=apart,
            tolerance=allowed,
            output="logits",
        )
