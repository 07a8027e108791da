"""A checkpoint seen as the place where a graph reads its weights: which bytes are which parameter."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from peftsurgery.commands.assembled_weights import Part, parts
from peftsurgery.commands.fitting import common_task, labels
from peftsurgery.commands.operating import brought
from peftsurgery.disk.checkpoint import Checkpoint, Stored, load, open_checkpoint
from peftsurgery.disk.locate import locate
from peftsurgery.disk.pieces import Piece, whole
from peftsurgery.errors import CheckpointError, NotReferable, listing
from peftsurgery.live import pretrained
from peftsurgery.live.hollow import hollow
from peftsurgery.live.precision import convert
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
        made: the same for those that lie nowhere as the model computes with them: what makes them.
        others: files that are not the checkpoint's, and what they are called beside its own.
    """

    model: nn.Module
    checkpoint: Checkpoint
    held: Mapping[str, Stored]
    made: Mapping[str, Piece | Part] = field(default_factory=dict)
    others: Mapping[Path, str] = field(default_factory=dict)

    def spans(self, below: Path) -> dict[str, Span]:
        """Where the bytes lie, in a graph's words, if all files lie `below` the graph's directory."""
        from peftsurgery.graph.reference import Span

        return {
            name: Span(self._below(below, stored.file), stored.start, stored.nbytes)
            for name, stored in self.held.items()
        }

    def files(self, below: Path) -> dict[str, Path]:
        """The files that they lie in, by the words that `spans` has for them."""
        return {self._below(below, stored.file): stored.file for stored in self.held.values()}

    def _below(self, below: Path, file: Path) -> str:
        own = file not in self.others
        name = file.relative_to(self.checkpoint.path) if own else self.others[file]
        return (below / name).as_posix()

    def readers(self) -> dict[str, Callable[[], Tensor]]:
        """What reads or makes each of them; the memory goes back with the tensor."""
        read = {name: partial(load, stored) for name, stored in self.held.items()}
        made = {n: p.make if isinstance(p, Part) else partial(whole, p) for n, p in self.made.items()}
        return {**read, **made}


def base_of(order: Order, source: nn.Module | str | Path) -> Base:
    """The model of a directory, and where its weights lie; only headers and buffers are read.

    Raises:
        CheckpointError: the checkpoint lacks weights, or holds them in other shapes.
        NotReferable: it is no directory, or some are not stored as the model computes with them.
    """
    if not isinstance(source, str | Path):
        raise NotReferable("A live model's weights lie in no file that a graph could read")
    checkpoint = open_checkpoint(locate(source))
    dtype = order.dtype or _dtype(checkpoint, order.trust_remote_code)
    model = hollow(
        checkpoint.path,
        dtype,
        task=common_task(order.adapters, order.task),
        labels=labels(order.adapters),
        trust_remote_code=order.trust_remote_code,
    )
    convert(model, dtype)
    assembled = parts(model, checkpoint.tensors)
    found = _found(model, checkpoint)
    _spread(model, found)
    held = _fitting(model, checkpoint, found, assembled, brought(order.adapters))
    buffers = dict(model.named_buffers())
    fill(model, {name: load(stored) for name, stored in held.items() if name in buffers})
    made: dict[str, Piece | Part] = {**_cast(model, held), **assembled}
    return Base(model, checkpoint, {name: held[name] for name in held if name not in made}, made)


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
    found: dict[str, Stored] = {}
    for name, stored in checkpoint.tensors.items():
        if loading.names[name] in loading.assembled:
            continue
        other = found.setdefault(loading.names[name], stored)
        if other is not stored:
            raise NotReferable(
                f"{checkpoint.path} holds {loading.names[name]!r} twice, as {other.name!r} and {name!r}"
            )
    return found


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
    model: nn.Module,
    checkpoint: Checkpoint,
    found: Mapping[str, Stored],
    assembled: Collection[str],
    fresh: Collection[str],
) -> dict[str, Stored]:
    """What is stored for the model; what the adapters bring in its place may be missing, or have another shape."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    replaced = {name for name in shapes if pretrained.inside(name, fresh)}
    lost = [name for name in shapes if name not in {*found, *assembled, *replaced}]
    pretrained.check_complete(checkpoint.path, type(model).__name__, lost)
    fits = {
        name: found[name] for name, shape in shapes.items() if name in found and found[name].shape == shape
    }
    for name in found.keys() & shapes.keys() - fits.keys() - replaced:
        raise CheckpointError(
            f"{found[name].file} holds {found[name].name!r} as {found[name].shape}, and the model has {name!r} as "
            f"{shapes[name]}. Correct config.json; nothing was written."
        )
    return fits


def _cast(model: nn.Module, held: Mapping[str, Stored]) -> dict[str, Piece]:
    """What the model computes with in another dtype than it is stored in; tied names share a piece.

    Raises:
        NotReferable: it is stored in numbers that are not its values.
    """
    made: dict[int, Piece] = {}
    cast = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in held or held[name].torch_dtype == parameter.dtype:
            continue
        if not held[name].torch_dtype.is_floating_point or held[name].torch_dtype.itemsize < 2:
            raise NotReferable(f"{held[name].file} holds {held[name].name!r} in {held[name].torch_dtype}")
        piece = Piece(name, parameter.dtype, held[name])
        cast[name] = made.setdefault(id(held[name]), piece)
    return cast
