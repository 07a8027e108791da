"""merge --adapters-from: many adapters into one base, a model of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from peftsurgery.commands.adapter_list import Entry
from peftsurgery.commands.fleet_journal import noted
from peftsurgery.commands.fleet_pass import Fleet, Outcome, one_pass
from peftsurgery.commands.merge_disk import shared_facts
from peftsurgery.commands.report import Report, size
from peftsurgery.disk.checkpoint import open_checkpoint
from peftsurgery.disk.durable import check_free, remove_empty, writing
from peftsurgery.disk.engines import Engine
from peftsurgery.disk.locate import locate
from peftsurgery.disk.lock import locked
from peftsurgery.disk.sharing import STORE, Sharing, groups, untouched
from peftsurgery.errors import FleetError, PlanError, SurgeryError, listing
from peftsurgery.events import Event, Listener

TOGETHER, ROOM = 16, 256 << 20
"""How many models are written in one pass over the base at most, and the bytes of their adapters' files.

The latter are also what is held of merges that are ready.
"""
SHOWN = 3
"""Of how many adapters that failed the message tells why; the report tells it of all."""


def merge_fleet(fleet: Fleet, engine: Engine, listen: Listener) -> Report:
    """Merge every adapter into a model of its own; what keeps one from it does not keep the others.

    Raises:
        FleetError: some could not be merged; it has the whole report.
        PlanError, CheckpointError: none can be; nothing is written.
    """
    _check_places(fleet)
    made = [path for path in (fleet.job.out, *fleet.job.out.parents) if not path.exists()]
    sharing = _sharing(fleet) if fleet.job.share_untouched else None
    try:
        with _room(fleet.job.out, sharing):
            outcomes = _outcomes(fleet, sharing, engine, listen)
            return _told(fleet, outcomes, sharing.nbytes if sharing else 0)
    finally:
        remove_empty(made)


@contextmanager
def _room(out: Path, sharing: Sharing | None) -> Iterator[None]:
    """The directory of all models, which is one fleet's at a time, and in the end holds nothing that no model has."""
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with locked(out, f"merging into {out}"):
        try:
            yield
        finally:
            if sharing is not None:
                sharing.prune()


def _outcomes(fleet: Fleet, sharing: Sharing | None, engine: Engine, listen: Listener) -> list[Outcome]:
    """What became of every adapter, in their order."""
    found: dict[str, Outcome] = {}
    try:
        for entries in _passes(fleet.entries):
            for outcome in one_pass(fleet, entries, sharing, engine, listen):
                found[outcome.entry.name] = outcome
                listen(Event("merge", outcome.entry.name, len(found), len(fleet.entries), outcome.written))
    except KeyboardInterrupt:
        whole = sum(outcome.error is None for outcome in found.values())
        if whole:
            said = f"Interrupted; {whole} of {len(fleet.entries)} models are whole. Go on with `--resume`."
            raise KeyboardInterrupt(said) from None
        raise
    return [found[entry.name] for entry in fleet.entries]


def _check_places(fleet: Fleet) -> None:
    """Refuse, before anything is written, a model's place that is taken, unless it may be the model itself."""
    known = noted(fleet.job.out) if fleet.job.resume else {}
    taken = [entry.name for entry in fleet.entries if entry.name not in known and _is_taken(fleet, entry)]
    if taken:
        remedy = "Give" if fleet.job.resume else "Go on with `--resume` if these are of this list, or give"
        raise PlanError(
            f"{fleet.job.out} holds {listing(taken)} already. {remedy} another `-o` or other "
            "names; nothing was written."
        )


def _is_taken(fleet: Fleet, entry: Entry) -> bool:
    out = fleet.job.out / entry.name
    try:
        check_free(out.expanduser().resolve(), out)
    except SurgeryError:
        return True
    return False


def _sharing(fleet: Fleet) -> Sharing:
    """The layout in which every tensor that some models leave alone is written once.

    What is prepared for it stays ready for writing, as far as memory is meant to hold it.
    """
    found, room = [], ROOM
    for entry in fleet.entries:
        with suppress(SurgeryError):  # it will be told when its turn comes
            prepared = fleet.prepared(entry)
            found.append(untouched(prepared.plan(fleet.job.out).tasks))
            room -= prepared.nbytes
            if room >= 0:
                fleet.ready[entry.name] = prepared
    shards = open_checkpoint(locate(fleet.job.model)).shards
    largest = max(sum(stored.nbytes for stored in shard.tensors) for shard in shards)
    return Sharing(fleet.job.out / STORE, groups(found), fleet.job.max_shard_size or largest)


def _passes(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """As many together as memory is meant to hold."""
    some: list[Entry] = []
    room = ROOM
    for entry in entries:
        nbytes = _nbytes(entry.path)
        if some and (len(some) == TOGETHER or nbytes > room):
            yield some
            some, room = [], ROOM
        some.append(entry)
        room -= nbytes
    yield some


def _nbytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file())


def _told(fleet: Fleet, outcomes: Sequence[Outcome], common: int) -> Report:
    """The report; `common` is the size of the files that models share."""
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    names = [outcome.entry.name for outcome in failed]
    before = sum(outcome.before for outcome in outcomes)
    facts = {
        "model": str(fleet.job.model),
        "merged": len(outcomes) - len(failed) - before,
        "merged before": before,
        "failed": names,
        **shared_facts(file for outcome in outcomes for file in outcome.files),
        "written": size(common + sum(outcome.written for outcome in outcomes)),
        "out": str(fleet.job.out),
        "models": [_said(outcome) for outcome in outcomes],
    }
    headline = f"Merged {facts['merged']} of {len(outcomes)} adapters into models of their own."
    report = Report("merge", headline, facts, table=_table(outcomes))
    if failed:
        raise FleetError(
            f"{listing(names)} of {len(outcomes)} adapters could not be merged, and the others were. "
            + " ".join(f"{outcome.entry.name}: {outcome.error}" for outcome in failed[:SHOWN]),
            report=report,
        )
    return report


def _said(outcome: Outcome) -> dict[str, object]:
    return {
        "name": outcome.entry.name,
        "adapter": str(outcome.entry.path),
        "before": outcome.before,
        "folded": outcome.folded,
        "written": outcome.written,
        "shared": outcome.shared,
        "error": None if outcome.error is None else str(outcome.error),
    }


def _table(outcomes: Sequence[Outcome]) -> list[tuple[str, ...]]:
    rows = [
        (one.entry.name, "failed", "", "")
        if one.error is not None
        else (one.entry.name, "before", "", "")
        if one.before
        else (one.entry.name, str(one.folded), size(one.written), size(one.shared))
        for one in outcomes
    ]
    return [("model", "folded", "written", "shared"), *rows]
