"""One pass over a base: some adapters of a fleet, each folded into a model of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path

from peftsurgery.commands.adapter_files import Given
from peftsurgery.commands.adapter_list import Entry
from peftsurgery.commands.fleet_journal import digest, note, noted
from peftsurgery.commands.merge_disk import Job, Prepared, complete, prepare, words_of
from peftsurgery.disk.engines import Engine, Failed
from peftsurgery.disk.merge import Planned
from peftsurgery.disk.parts import counted, written
from peftsurgery.disk.resumable import Unfinished, resumable
from peftsurgery.disk.sharing import Sharing
from peftsurgery.disk.writer import ShardDone, ShardTask
from peftsurgery.errors import CheckpointError, DiskError, SurgeryError
from peftsurgery.events import Listener


@dataclass(frozen=True, slots=True, eq=False)
class Fleet:
    """Many merges into one base.

    Args:
        entries: the adapters, each with the name of its model.
        job: what all merges have in common; `out` is the directory of all models.
        load: reads the adapter of a directory.
        ready: merges that are prepared already, by name.
    """

    entries: tuple[Entry, ...]
    job: Job
    load: Callable[[Path], tuple[Given, ...]]
    ready: dict[str, Prepared] = field(default_factory=dict)

    def prepared(self, entry: Entry) -> Prepared:
        """The merge of one adapter, which is not ready afterwards; see `prepare` for what it raises."""
        if entry.name in self.ready:
            return self.ready.pop(entry.name)
        given, out = self.load(entry.path), self.job.out / entry.name
        return prepare(replace(self.job, given=given, out=out, share_untouched=False))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one adapter of a fleet.

    Args:
        folded: how many tensors it changed.
        files: the weight files of its model.
        error: why there is no model of it.
        before: whether the model was whole already.
    """

    entry: Entry
    folded: int = 0
    files: tuple[ShardDone, ...] = ()
    error: SurgeryError | None = None
    before: bool = False

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
    unfinished: Unfinished
    stack: ExitStack
    found: list[ShardDone | Failed] = field(default_factory=list)


def one_pass(
    fleet: Fleet, entries: Sequence[Entry], sharing: Sharing | None, engine: Engine, listen: Listener
) -> Iterator[Outcome]:
    """Merge some adapters, reading the base once: every shard of it is folded for all of them before the next.

    What became of an adapter is told when it is known. One that fails leaves the others alone.

    Raises:
        DiskError: the disk is full or fails; files that are whole are kept for `--resume`.
        CheckpointError: the files that the models share cannot be written.
    """
    known = noted(fleet.job.out) if fleet.job.resume else {}
    with ExitStack() as together:
        models: list[Begun] = []
        for entry in entries:
            try:
                prepared = fleet.prepared(entry)
                if _is_whole(prepared, entry, known):
                    yield Outcome(entry, before=True)
                    continue
                models.append(_begin(prepared, entry, sharing))
            except DiskError:
                raise
            except SurgeryError as error:
                yield Outcome(entry, error=error)
            else:
                together.push(models[-1].stack)
        if sharing is not None:
            _write_twins(models, sharing, engine, listen)
        yield from _written(models, engine, listen)


def _is_whole(prepared: Prepared, entry: Entry, known: Mapping[str, str]) -> bool:
    """Whether the model is there, made by this very merge before.

    Raises:
        CheckpointError: another merge made it.
    """
    out = prepared.job.out
    if entry.name not in known or not out.exists() or not any(out.iterdir()):
        return False
    if known[entry.name] == digest(words_of(prepared)):
        return True
    raise CheckpointError(
        f"{out} was merged from another base or adapter, or with other options. Remove it, or give the adapter another "
        "name; it was left as it is."
    )


def _begin(prepared: Prepared, entry: Entry, sharing: Sharing | None) -> Begun:
    words = words_of(prepared)
    with ExitStack() as stack:
        unfinished = stack.enter_context(resumable(prepared.job.out, words, resume=prepared.job.resume))
        planned = prepared.plan(unfinished.directory)
        if sharing is not None:
            planned = replace(planned, tasks=sharing.arranged(planned.tasks, unfinished.directory))
        return Begun(entry, prepared, planned, unfinished, stack.pop_all())


def _written(models: Sequence[Begun], engine: Engine, listen: Listener) -> Iterator[Outcome]:
    """What became of the models, each as soon as all of its files are there, or cannot be."""
    owners = {task.file: model for model in models for task in model.planned.tasks}
    for model in models:
        engine = model.unfinished.rest(engine)
    tasks = _interleaved([model.planned.tasks for model in models])
    with closing(engine(tasks, counted(tasks, listen))) as found:
        for outcome in found:
            model = owners[outcome.file]
            model.found.append(outcome)
            if len(model.found) == len(model.planned.tasks):
                yield _ended(model)


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
            done = complete(model.prepared, model.planned, model.unfinished.directory, files)
            out = model.prepared.job.out
            note(out.parent, out.name, digest(model.unfinished.job))
    except DiskError:
        raise
    except SurgeryError as error:
        return Outcome(model.entry, error=error)
    return Outcome(model.entry, len(done.folded), files)
