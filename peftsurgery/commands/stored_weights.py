"""A checkpoint seen as the place where a graph reads its weights: which bytes are which parameter."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from peftsurgery.commands.fitting import common_task, labels
from peftsurgery.commands.operating import brought
from peftsurgery.disk.checkpoint import Checkpoint, Stored, load, open_checkpoint
from peftsurgery.disk.locate import locate
from peftsurgery.errors import CheckpointError, NotReferable, listing
from peftsurgery.live import pretrained
from peftsurgery.live.hollow import hollow
from peftsurgery.live.sites import ties
from peftsurgery.live.swap import fill

if TYPE_CHECKING:
    from peftsurgery.commands.exporting import Order
    from peftsurgery.graph.reference import Span


@dataclass(frozen=True, slots=True)
class Base:
    """A model whose parameters stay in files.

    Args:
        model: with parameters that have no bytes, and buffers that have.
        held: for each parameter's name, tied ones under every name, where its bytes lie.
    """

    model: nn.Module
    checkpoint: Checkpoint
    held: Mapping[str, Stored]

    def spans(self, below: Path) -> dict[str, Span]:
        """Where the bytes lie, in a graph's words, if the checkpoint's files lie `below` the graph's directory."""
        from peftsurgery.graph.reference import Span

        root = self.checkpoint.path
        return {
            name: Span((below / stored.file.relative_to(root)).as_posix(), stored.start, stored.nbytes)
            for name, stored in self.held.items()
        }

    def readers(self) -> dict[str, Callable[[], Tensor]]:
        """What reads each of them; the memory goes back with the tensor."""
        return {name: partial(load, stored) for name, stored in self.held.items()}


def base_of(order: Order, source: nn.Module | str | Path) -> Base:
    """The model of a directory, and where its weights lie; only headers and buffers are read.

    Raises:
        CheckpointError: the checkpoint lacks weights, or holds them in other shapes.
        NotReferable: it is no directory, or some are not stored as the model computes with them.
    """
    if not isinstance(source, str | Path):
        raise NotReferable("A live model's weights lie in no file that a graph could read")
    checkpoint = open_checkpoint(locate(source))
    model = hollow(
        checkpoint.path,
        order.dtype or _dtype(checkpoint, order.trust_remote_code),
        task=common_task(order.adapters, order.task),
        labels=labels(order.adapters),
        trust_remote_code=order.trust_remote_code,
    )
    found = _found(model, checkpoint)
    _spread(model, found)
    held = _fitting(model, checkpoint, found, brought(order.adapters))
    buffers = dict(model.named_buffers())
    fill(model, {name: load(stored) for name, stored in held.items() if name in buffers})
    return Base(model, checkpoint, held)


def _dtype(checkpoint: Checkpoint, trust_remote_code: bool) -> torch.dtype:
    """What transformers loads the checkpoint in: its config's word, or else what its first tensor is."""
    said = pretrained.config(checkpoint.path, trust_remote_code=trust_remote_code).dtype
    if isinstance(said, torch.dtype):
        return said
    floats = (t.torch_dtype for t in checkpoint.tensors.values() if t.torch_dtype.is_floating_point)
    return next(floats, torch.float32)


def _found(model: nn.Module, checkpoint: Checkpoint) -> dict[str, Stored]:
    """For each name in the model what is stored for it, old spellings and prefixes resolved."""
    loading = pretrained.loading(model, checkpoint.tensors)
    _refuse_assembled(model, loading.assembled)
    found: dict[str, Stored] = {}
    for name, stored in checkpoint.tensors.items():
        other = found.setdefault(loading.names[name], stored)
        if other is not stored:
            raise NotReferable(
                f"{checkpoint.path} holds {loading.names[name]!r} twice, as {other.name!r} and {name!r}"
            )
    return found


def _refuse_assembled(model: nn.Module, assembled: Collection[str]) -> None:
    if assembled:
        raise NotReferable(
            f"{listing(sorted(assembled))} of {type(model).__name__} is not in the checkpoint as such: "
            "transformers assembles it on loading"
        )


def _spread(model: nn.Module, found: dict[str, Stored]) -> None:
    """Give every name of a tied parameter the one place of its bytes."""
    for group in ties(model):
        stored = [found[name] for name in group if name in found]
        if any(not _same(stored[0], other) for other in stored[1:]):
            raise NotReferable(f"{listing(group)} are one weight in the model and differ in the checkpoint")
        if stored:
            found.update(dict.fromkeys(group, stored[0]))


def _same(one: Stored, other: Stored) -> bool:
    alike = (one.dtype, one.shape) == (other.dtype, other.shape)
    return alike and torch.equal(load(one).view(torch.uint8), load(other).view(torch.uint8))


def _fitting(
    model: nn.Module, checkpoint: Checkpoint, found: Mapping[str, Stored], fresh: Collection[str]
) -> dict[str, Stored]:
    """What is stored for the model, without what the adapters bring in its place."""
    state = model.state_dict()
    needed = [name for name in state if not pretrained.inside(name, fresh)]
    pretrained.check_complete(
        checkpoint.path, type(model).__name__, [name for name in needed if name not in found]
    )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in needed:
        _check(found[name], name, state[name], name in parameters)
    return {name: found[name] for name in needed}


def _check(stored: Stored, name: str, expected: torch.Tensor, referenced: bool) -> None:
    if stored.shape != tuple(expected.shape):
        raise CheckpointError(
            f"{stored.file} holds {stored.name!r} as {stored.shape}, and the model has {name!r} as "
            f"{tuple(expected.shape)}. Correct config.json; nothing was written."
        )
    if referenced and stored.torch_dtype != expected.dtype:
        raise NotReferable(
            f"{stored.file} holds {stored.name!r} in {stored.torch_dtype}, and the model computes in {expected.dtype}"
        )
