"""One pass over a base: some adapters of a fleet, each folded into a model of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path

from peftsurgery.commands.adapter_files import Given
from peftsurgery.commands.adapter_list import Entry
from peftsurgery.commands.merge_disk import Job, Prepared, complete, prepare
from peftsurgery.disk.durable import staged
from peftsurgery.disk.engines import Engine, Failed
from peftsurgery.disk.merge import Planned
from peftsurgery.disk.parts import counted, written
from peftsurgery.disk.sharing import Sharing
from peftsurgery.disk.writer import ShardDone, ShardTask
from peftsurgery.errors import SurgeryError
from peftsurgery.events import Listener


@dataclass(frozen=True, slots=True, eq=False)
class Fleet:
    """Many merges into one base.

    Args:
        entries: the adapters, each with the name of its model.
        job: what all merges have in common; `out` is the directory of all models.
        load: reads the adapter of a directory.
    """

    entries: tuple[Entry, ...]
    job: Job
    load: Callable[[Path], tuple[Given, ...]]

    def prepared(self, entry: Entry) -> Prepared:
        """The merge of one adapter; see `prepare` for what it raises."""
        return prepare(
            replace(
                self.job, given=self.load(entry.path), out=self.job.out / entry.name, share_untouched=False
            )
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one adapter of a fleet.

    Args:
        folded: how many tensors it changed.
        files: the weight files of its model.
        error: why there is no model of it.
    """

    entry: Entry
    folded: int = 0
    files: tuple[ShardDone, ...] = ()
    error: SurgeryError | None = None

    @property
    def written(self) -> int:
        """Bytes of its files that are its own."""
        return sum(file.nbytes for file in self.files if not file.shared)

    @property
    def shared(self) -> int:
        """Bytes of its files that other models have too."""
        return sum(file.nbytes for file in self.files if file.shared)


@dataclass(frozen=True, slots=True, eq=False)
class Begun:
    """A model that is being written: when the stack closes it is whole, or as if it had not been begun."""

    entry: Entry
    prepared: Prepared
    planned: Planned
    directory: Path
    stack: ExitStack
    found: list[ShardDone | Failed] = field(default_factory=list)


def one_pass(
    fleet: Fleet, entries: Sequence[Entry], sharing: Sharing | None, engine: Engine, listen: Listener
) -> Iterator[Outcome]:
    """Merge some adapters, reading the base once: every shard of it is folded for all of them before the next.

    What became of an adapter is told when it is known. One that fails leaves the others alone.

    Raises:
        CheckpointError: the files that the models share cannot be written; no model is left half written.
    """
    with ExitStack() as together:
        begun: dict[Path, Begun] = {}
        for entry in entries:
            try:
                model = _begin(fleet, entry, sharing)
            except SurgeryError as error:
                yield Outcome(entry, error=error)
            else:
                together.push(model.stack)
                begun |= {task.file: model for task in model.planned.tasks}
        models = list(dict.fromkeys(begun.values()))
        if sharing is not None:
            _write_twins(models, sharing, engine, listen)
        tasks = _interleaved([model.planned.tasks for model in models])
        with closing(engine(tasks, counted(tasks, listen))) as found:
            for outcome in found:
                model = begun[outcome.file]
                model.found.append(outcome)
                if len(model.found) == len(model.planned.tasks):
                    yield _ended(model)


def _begin(fleet: Fleet, entry: Entry, sharing: Sharing | None) -> Begun:
    prepared = fleet.prepared(entry)
    with ExitStack() as stack:
        directory = stack.enter_context(staged(prepared.job.out))
        planned = prepared.plan(directory)
        if sharing is not None:
            planned = replace(planned, tasks=sharing.arranged(planned.tasks, directory))
        return Begun(entry, prepared, planned, directory, stack.pop_all())


def _write_twins(models: Sequence[Begun], sharing: Sharing, engine: Engine, listen: Listener) -> None:
    missing: dict[Path, ShardTask] = {}
    for model in models:
        missing |= sharing.missing(model.planned.tasks)
    written(list(missing.values()), engine, listen)


def _interleaved(tasks: Sequence[Sequence[ShardTask]]) -> list[ShardTask]:
    """The first file of every model, then the second of every model: those are made from the same part of the base."""
    return [task for rank in zip_longest(*tasks) for task in rank if task is not None]


def _ended(model: Begun) -> Outcome:
    """The model becomes whole, or goes."""
    failed = next((found.error for found in model.found if isinstance(found, Failed)), None)
    files = tuple(found for found in model.found if isinstance(found, ShardDone))
    try:
        with model.stack:
            if failed is not None:
                raise failed
            done = complete(model.prepared, model.planned, model.directory, files)
    except SurgeryError as error:
        return Outcome(model.entry, error=error)
    return Outcome(model.entry, len(done.folded), files)
