"""Merging in a graph: the stream of its initializers, folded, then put back under the same names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from peftsurgery.adapter import Adapter
from peftsurgery.errors import TiedSites, listing
from peftsurgery.events import Listener, ignore
from peftsurgery.fold import folded, touches
from peftsurgery.graph.passes import as_ir, as_torch
from peftsurgery.graph.sites import ties

if TYPE_CHECKING:
    import onnx_ir as ir


def merge(model: ir.Model, adapters: Sequence[Adapter], listen: Listener = ignore) -> None:
    """Absorb the adapters into the initializers; every one is folded before the first is put in place.

    Args:
        adapters: rebased to the graph's sites (`peftsurgery.adapter.rebased`).

    Raises:
        TiedSites: a touched initializer plays several parts, so that folding one would change the others.
        UnclaimedSites, NonFiniteWeight, NotFoldable: nothing was changed.
    """
    touched = touches(*adapters)
    for names in ties(model):
        if names[0] in touched:
            raise TiedSites(
                f"{names[0]!r} is also {listing(names[1:])}, and folding it would change both. Merge into the "
                "checkpoint with `--untie` and export what comes out; nothing was changed.",
                names=names,
            )
    new = dict(folded(tensors(model, touched), *adapters, listen=listen))
    for name, tensor in new.items():
        model.graph.initializers[name].const_value = as_ir(tensor, name)


def tensors(
    model: ir.Model, names: Sequence[str] | dict[str, object] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The initializers as torch tensors, by name, one at a time; all, or those called `names`."""
    for name, value in model.graph.initializers.items():
        if value.const_value is not None and (names is None or name in names):
            yield name, as_torch(value.const_value)
