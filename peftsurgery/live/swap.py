"""The only file that changes a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from peftsurgery.errors import PlanError

CHART = "_peftsurgery"


def swap(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Put each module at its name and return what stood there; `swap` of that undoes it, bit for bit.

    Raises:
        PlanError: a name that the model does not have; nothing has been changed.
    """
    parents: dict[str, nn.Module] = {}
    places = {name: _place(model, name, parents) for name in modules}
    old = {name: parent._modules[leaf] for name, (parent, leaf) in places.items()}
    try:
        for name, (parent, leaf) in places.items():
            parent._modules[leaf] = modules[name]
    except BaseException:
        for name, (parent, leaf) in places.items():
            parent._modules[leaf] = old[name]
        raise
    return {name: module for name, module in old.items() if module is not None}


def require_grad(parameters: Iterable[nn.Parameter], flag: bool) -> None:
    """Let the parameters train, or keep them from it."""
    for parameter in parameters:
        parameter.requires_grad_(flag)


def annotate(model: nn.Module, chart: object | None) -> None:
    """Write the chart of what was grafted onto the model, or wipe it."""
    if chart is not None:
        model.__dict__[CHART] = chart
    else:
        model.__dict__.pop(CHART, None)


def tie_config(model: nn.Module, tied: bool | None) -> bool | None:
    """Make the model's config say whether its output embeddings are the input ones; returns what it said.

    `None` leaves it alone, and comes back from a model without such a config.
    """
    config = getattr(model, "config", None)
    before = getattr(config, "tie_word_embeddings", None)
    if tied is not None and before is not None:
        config.tie_word_embeddings = tied  # type: ignore[union-attr]
    return before


def _place(model: nn.Module, name: str, parents: dict[str, nn.Module]) -> tuple[nn.Module, str]:
    """The module that holds `name`, and the last part of it; `parents` remembers those found before."""
    above, _, leaf = name.rpartition(".")
    if above not in parents:
        try:
            parents[above] = model.get_submodule(above)
        except AttributeError:
            parents[above] = nn.Module()
    if not name or parents[above]._modules.get(leaf) is None:
        raise PlanError(f"{type(model).__name__} has no module {name!r} to swap. Nothing was changed.")
    return parents[above], leaf
