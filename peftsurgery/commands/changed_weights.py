"""Weights that lie in no file as the model computes with them: what adapters change, and what is cast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from peftsurgery.adapter import Adapter, check, rebased
from peftsurgery.commands.fitting import folded_groups
from peftsurgery.commands.stored_weights import Base
from peftsurgery.disk.pieces import Piece
from peftsurgery.disk.shard import Stored, read_shard
from peftsurgery.disk.writer import ShardTask, write_shard
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
    """
    state = frozenset(base.model.state_dict())
    fitted = [rebased(check(adapter), sites(base.model), state)[0] for adapter in adapters]
    stored = {**base.held, **{name: piece.origin for name, piece in base.made.items()}}
    made = _pieces(base.model, stored, fitted)
    groups = [group for group in ties(base.model) if any(name in made for name in group)]
    settle(groups, dict(folded_groups(stored, groups, fitted)), untie=False)
    for group in groups:
        made.update(dict.fromkeys(group, made[group[0]]))
    held = {name: place for name, place in base.held.items() if name not in made}
    return replace(base, held=held, made={**base.made, **made})


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

    Raises:
        NonFiniteWeight: folding gave a NaN or an infinity.
        CheckpointError: the file cannot be written.
    """
    if not base.made:
        return base
    pieces = {piece.name: piece for piece in base.made.values()}
    file.parent.mkdir(exist_ok=True)
    write_shard(ShardTask(file, tuple(pieces.values()), {"format": "pt"}), listen)
    stored = {tensor.name: tensor for tensor in read_shard(file).tensors}
    now = {name: stored[piece.name] for name, piece in base.made.items()}
    return replace(base, held={**base.held, **now}, made={})
