"""Is a merged checkpoint what its base and its adapters make? Every tensor is made again, and its bits compared."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftsurgery.adapter import Adapter
from peftsurgery.changes import Change
from peftsurgery.disk.checkpoint import Checkpoint, Stored, load
from peftsurgery.disk.pieces import Block, Piece, make
from peftsurgery.events import Event, Listener, ignore
from peftsurgery.fold import tiles, touches
from peftsurgery.tally import Tally


@dataclass(frozen=True, slots=True)
class Found:
    """What became of one tensor.

    Args:
        tally: how far the adapters moved it; of nothing where they do not touch it.
        off: the largest absolute difference from what it should be; 0 where every bit is right.
    """

    name: str
    tally: Tally
    equal: bool
    off: float = 0.0


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a comparison found.

    Args:
        found: the tensors that were compared.
        missing: what the merged checkpoint should hold and does not.
        unexpected: what it holds and should not, or holds in another shape.
        cast: how many tensors have another dtype than in the base.
    """

    found: tuple[Found, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    cast: int

    @property
    def wrong(self) -> tuple[str, ...]:
        """Everything that is not as it should be."""
        return (*(one.name for one in self.found if not one.equal), *self.missing, *self.unexpected)


def compare(
    base: Checkpoint,
    merged: Checkpoint,
    adapters: Sequence[Adapter],
    *,
    rename: Callable[[str], str],
    twins: Mapping[str, str],
    sample: int | None = None,
    listen: Listener = ignore,
) -> Comparison:
    """Make the tensors of `merged` again, one at a time, and compare their bits.

    Files and dtypes may be others than the base's: each tensor is made in the dtype that it has in `merged`.

    Args:
        adapters, rename, twins: as for `merge`.
        sample: how many of the tensors that the adapters touch, and of the others, to compare; all by default.
    """
    stored = {rename(name): tensor for name, tensor in base.tensors.items()}
    origins: dict[str, Stored | Tensor] = {t: v for a in adapters for t, v in a.replaced.items()}
    origins |= stored | {twin: stored[holder] for twin, holder in twins.items()}
    held, changes = merged.tensors, touches(*adapters)
    shaped = [name for name in held if name in origins and tuple(origins[name].shape) == held[name].shape]
    chosen = [name for name in shaped if name in _chosen(shaped, changes, sample)]
    found = tuple(_all(chosen, held, origins, changes, listen))
    return Comparison(
        found,
        missing=tuple(name for name in origins if name not in held),
        unexpected=tuple(name for name in held if name not in set(shaped)),
        cast=sum(name in stored and held[name].dtype != stored[name].dtype for name in shaped),
    )


def _chosen(names: Sequence[str], touched: Collection[str], sample: int | None) -> set[str]:
    """All of them, or `sample` of those that are touched and of those that are not, spread evenly."""
    kinds = [name for name in names if name in touched], [name for name in names if name not in touched]
    return {name for kind in kinds for name in _spread(kind, sample)}


def _spread(names: Sequence[str], sample: int | None) -> Sequence[str]:
    if sample is None or sample >= len(names):
        return names
    return [names[i * len(names) // sample] for i in range(sample)]


def _all(
    names: Sequence[str],
    held: Mapping[str, Stored],
    origins: Mapping[str, Stored | Tensor],
    changes: Mapping[str, tuple[Change, ...]],
    listen: Listener,
) -> Iterator[Found]:
    for done, name in enumerate(names, 1):
        origin = origins[name]
        before = load(origin) if isinstance(origin, Stored) else origin.detach()
        yield _found(name, before, load(held[name]), changes.get(name, ()))
        listen(Event("verify", name, done, len(names), held[name].nbytes))


def _found(name: str, before: Tensor, after: Tensor, changes: Sequence[Change]) -> Found:
    if changes:
        piece, made = Piece(name, after.dtype, before, tuple(changes)), torch.empty_like(after)
        told = make(piece, Block(tiles(changes, piece.shape)), before, made, measure=True)
    else:
        made, told = before.to(after.dtype), Tally()
    equal = torch.equal(_bits(made), _bits(after))
    off = 0.0 if equal else float((made.double() - after.double()).abs().max())
    return Found(name, told, equal, off)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
