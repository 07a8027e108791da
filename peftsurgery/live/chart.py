"""What was grafted onto a model, written on the model: by names, so that a copy or a pickle keeps it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from peftsurgery.errors import PlanError, listing, nearest
from peftsurgery.live.swap import CHART, Hook, annotate
from peftsurgery.planning import Plan
from peftsurgery.reading import AS_PEFT, Reading


@dataclass(frozen=True, slots=True)
class Record:
    """One adapter on a model: its plan, the modules that wear a graft of it, and per module what it replaces.

    An adapter of virtual tokens also has a carrier, the module that wears its parameters, and hooks.
    """

    name: str
    plan: Plan
    places: tuple[str, ...]
    replaces: tuple[tuple[str, tuple[str, ...]], ...] = ()
    task_type: str | None = None
    base: str | None = None
    carrier: str | None = None
    hooks: tuple[tuple[str, Hook], ...] = ()
    reading: Reading = AS_PEFT


@dataclass(frozen=True, slots=True)
class Chart:
    """Every adapter on a model, in the order of injection, and the parameters that were frozen for them."""

    records: tuple[Record, ...] = ()
    frozen: tuple[str, ...] = ()


def chart(model: nn.Module) -> Chart:
    """The model's chart; an empty one for a model nothing was grafted onto."""
    found = model.__dict__.get(CHART, Chart())
    assert isinstance(found, Chart)
    return found


def record(model: nn.Module, name: str) -> Record:
    """The record of one adapter.

    Raises:
        PlanError: the model has no adapter of that name.
    """
    known = {record.name: record for record in chart(model).records}
    if name not in known:
        near = f" Nearest: {listing(nearest(name, known))}." if nearest(name, known) else ""
        raise PlanError(
            f"{type(model).__name__} has no adapter {name!r}; it has {listing(list(known)) or 'none'}.{near} "
            "Nothing was changed."
        )
    return known[name]


def enter(model: nn.Module, new: Record, frozen: tuple[str, ...]) -> None:
    """Write one more adapter on the chart."""
    now = chart(model)
    annotate(model, replace(now, records=(*now.records, new), frozen=(*now.frozen, *frozen)))


def leave(model: nn.Module, name: str) -> tuple[str, ...]:
    """Take one adapter off the chart; returns the parameters to unfreeze when it was the last."""
    now = chart(model)
    rest = tuple(record for record in now.records if record.name != name)
    annotate(model, replace(now, records=rest) if rest else None)
    return () if rest else now.frozen
