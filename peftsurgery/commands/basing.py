"""An adapter in the names of a base, which no weight is read of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from peftsurgery.adapter import Adapter, rebased

if TYPE_CHECKING:
    from torch import nn


def based(adapter: Adapter, base: str | Path, trust_remote_code: bool = False) -> Adapter:
    """The adapter in the names, kinds and sizes of the model in `base`, recorded as its base.

    Raises:
        UnclaimedSites: the base has not the places that the adapter is at.
        MismatchedTensors: the shapes do not fit: another base.
    """
    from peftsurgery.live import anatomy, outputs, sites, soft

    model = skeleton(adapter, base, trust_remote_code)
    places = [*sites.sites(model), *soft.offered(model, adapter.plan), *outputs.offered(model, adapter.plan)]
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    fitted = rebased(adapter, places, names)[0]
    return replace(fitted, base=str(base), model_type=anatomy.model_type(model))


def skeleton(adapter: Adapter, base: str | Path, trust_remote_code: bool) -> nn.Module:
    """The model that plays the adapter's task on this base, without weights."""
    from peftsurgery.disk.locate import locate
    from peftsurgery.live import pretrained
    from peftsurgery.tasks import task

    known = task(adapter.task_type) if adapter.task_type else None
    return pretrained.skeleton(locate(base), task=known, trust_remote_code=trust_remote_code)
