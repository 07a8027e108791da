"""Weights that lie in no file as the model computes with them: what adapters change, what is cast or assembled."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from peftsurgery.adapter import Adapter, rebased
from peftsurgery.commands.assembled_weights import Part
from peftsurgery.commands.fitting import folded_groups
from peftsurgery.commands.stored_weights import Base
from peftsurgery.disk.adapter_files import put
from peftsurgery.disk.pieces import Piece
from peftsurgery.disk.shard import Stored, read_shard
from peftsurgery.disk.writer import ShardTask, write_shard
from peftsurgery.errors import NotReferable, listing
from peftsurgery.events import Listener
from peftsurgery.fold import touches
from peftsurgery.live.sites import sites, ties
from peftsurgery.ties import settle


def changed(base: Base, adapters: Sequence[Adapter]) -> Base:
    """The base with the adapters folded into it; only tied weights that they change are computed yet.

    Raises:
        UnclaimedSites, MismatchedTensors: an adapter was trained on another base.
        TiedSites: a tied weight would be folded behind its twin's back.
        NotFoldable: a method that no merge absorbs.
        NotReferable: an adapter changes what transformers assembles on loading.
    """
    state = frozenset(base.model.state_dict())
    fitted = [rebased(adapter, sites(base.model), state)[0] for adapter in adapters]
    _check_stored(base, touches(*fitted))
    cast = {name: made.origin for name, made in base.made.items() if isinstance(made, Piece)}
    stored = {**base.held, **cast}
    made = _pieces(base.model, stored, fitted)
    groups = [group for group in ties(base.model) if any(name in made for name in group)]
    settle(groups, dict(folded_groups(stored, groups, fitted)), untie=False)
    for group in groups:
        made.update(dict.fromkeys(group, made[group[0]]))
    held = {name: place for name, place in base.held.items() if name not in made}
    return replace(base, held=held, made={**base.made, **made})


def _check_stored(base: Base, touched: Collection[str]) -> None:
    hit = sorted(name for name in touched if isinstance(base.made.get(name), Part))
    if hit:
        raise NotReferable(
            f"{listing(hit)} is changed by an adapter, and transformers assembles it on loading"
        )


def _pieces(
    model: nn.Module, stored: Mapping[str, Stored | Tensor], adapters: Sequence[Adapter]
) -> dict[str, Piece]:
    """How every tensor that the adapters change is made."""
    origins = {**{name: new for adapter in adapters for name, new in adapter.replaced.items()}, **stored}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        name: Piece(name, parameters[name].dtype, origins[name], changes)
        for name, changes in touches(*adapters).items()
    }


def written(base: Base, file: Path, listen: Listener) -> Base:
    """The base with everything that is made for it in `file`, block by block.

    What transformers assembles is in files of its own beside it, each written before the next is made.

    Raises:
        NonFiniteWeight: folding gave a NaN or an infinity.
        CheckpointError: the file cannot be written.
    """
    if not base.made:
        return base
    file.parent.mkdir(exist_ok=True)
    pieces = {piece.name: piece for piece in base.made.values() if isinstance(piece, Piece)}
    parts = {name: part for name, part in base.made.items() if isinstance(part, Part)}
    files = [_file(file, number) for number in range(len(parts) + bool(pieces))]
    if pieces:
        write_shard(ShardTask(files[-1], tuple(pieces.values()), {"format": "pt"}), listen)
    for one, part in zip(files, parts.values(), strict=False):
        put(one, [(part.name, part.make())])
    stored = {tensor.name: tensor for one in files for tensor in read_shard(one).tensors}
    now = {name: stored[piece.name] for name, piece in base.made.items()}
    return replace(base, held={**base.held, **now}, made={}, others={one: one.name for one in files})


def _file(first: Path, number: int) -> Path:
    return first.with_stem(f"{first.stem}-{number + 1:05}") if number else first
