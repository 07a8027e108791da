"""Merging in a graph: the stream of its initializers, folded, then put back under the same names."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from peftsurgery.adapter import Adapter
from peftsurgery.errors import MismatchedTensors, TiedSites, UnclaimedSites, listing
from peftsurgery.events import Listener, ignore
from peftsurgery.fold import folded, touches
from peftsurgery.graph.passes import TURNED, as_ir, as_torch
from peftsurgery.graph.sites import ties

if TYPE_CHECKING:
    import onnx_ir as ir


def merge(model: ir.Model, adapters: Sequence[Adapter], listen: Listener = ignore) -> None:
    """Absorb the adapters into the initializers; every one is folded before the first is put in place.

    Args:
        adapters: rebased to the graph's sites (`peftsurgery.adapter.rebased`).

    Raises:
        TiedSites: a touched initializer plays several parts, so that folding one would change the others.
        UnclaimedSites, MismatchedTensors, NonFiniteWeight, NotFoldable: nothing was changed.
    """
    fitting = [replace(adapter, replaced=_fitting(model, adapter)) for adapter in adapters]
    touched = touches(*fitting)
    for names in ties(model):
        if names[0] in touched:
            raise TiedSites(
                f"{names[0]!r} is also {listing(names[1:])}, and folding it would change both. Merge into "
                "the checkpoint with `--untie` and export what comes out; nothing was changed.",
                names=names,
            )
    new = dict(folded(tensors(model, touched), *fitting, listen=listen))
    for name, tensor in new.items():
        model.graph.initializers[name].const_value = as_ir(tensor, name)


def tensors(model: ir.Model, names: Container[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """The initializers as torch tensors, by name, one at a time; all, or those called `names`."""
    for name, value in model.graph.initializers.items():
        if value.const_value is not None and (names is None or name in names):
            yield name, as_torch(value.const_value)


def _fitting(model: ir.Model, adapter: Adapter) -> dict[str, Tensor]:
    """What the adapter replaces whole, stored as the graph stores it."""
    return {name: _stored(model, name, tensor) for name, tensor in adapter.replaced.items()}


def _stored(model: ir.Model, name: str, tensor: Tensor) -> Tensor:
    value = model.graph.initializers.get(name)
    if value is None:
        raise UnclaimedSites(
            f"The graph has no initializer {name!r}, which the adapter replaces. Export the model with the "
            "adapter's task; nothing was changed.",
            sites=[name],
        )
    stored = tensor.t() if TURNED in value.metadata_props else tensor
    if value.shape is None or tuple(value.shape) != tuple(stored.shape):
        raise MismatchedTensors(
            f"{name!r} has shape {tuple(stored.shape)} in the adapter and {value.shape} in the graph. "
            "Export the model with as many labels as the adapter has; nothing was changed.",
            unexpected=[name],
        )
    return stored
