"""A model that is written file by file, and can be taken up again where a crash or a full disk stopped it.

It is written beside its directory OUT, under hidden names:

    .OUT.partial/        the model, locked by the process that writes it; becomes OUT by a rename
    .OUT.partial.json    the journal: what the job is, which files are whole, and what their bytes are known by

A file is written into the journal when it is whole and on the disk. What is not in there is written again, and so is
what is not as the journal says; of a large file only what was not on the disk (`halfway`). A loader finds no model:
`config.json` comes last, just before the rename.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peftsurgery.disk import halfway
from peftsurgery.disk.durable import (
    check_free,
    discard,
    flush,
    remove_empty,
    sync_directory,
    write_json,
    writing,
)
from peftsurgery.disk.engines import Engine, Outcomes
from peftsurgery.disk.lock import locked
from peftsurgery.disk.progress import tell_all
from peftsurgery.disk.writer import ShardDone, ShardTask, is_written
from peftsurgery.errors import CheckpointError, DiskError, listing
from peftsurgery.events import Listener
from peftsurgery.tally import Tally

FORMAT = "peftsurgery merge 1"
WORDS = ("nbytes", "shared", "unshared", "sums")
"""What is noted of a file, beside its tallies."""
Job = Mapping[str, Any]
"""What a merge depends on, as JSON values."""


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A model that is being written.

    Args:
        directory: where its files go.
        job: what the job is.
        whole: the files that are whole, by name.
    """

    directory: Path
    job: Job
    whole: dict[str, ShardDone]

    def rest(self, engine: Engine) -> Engine:
        """The engine that writes what is not there yet, bit for bit, and has every file noted that is done.

        Tasks of other models go past it; what none of its own would write is removed.
        """

        def missing(tasks: Sequence[ShardTask], listen: Listener) -> Outcomes:
            kept = {task.file: found for task in tasks if (found := self._kept(task)) is not None}
            self.whole.clear()
            self.whole.update({self._name(file): found for file, found in kept.items()})
            todo = [task for task in tasks if task.file not in kept]
            sweep(self, (part for task in todo for part in halfway.parts(task.file)))
            for task in tasks:
                if task.file in kept:
                    tell_all(task.pieces, listen)
                    yield kept[task.file]
            with closing(engine(todo, listen)) as outcomes:
                for outcome in outcomes:
                    name = self._name(outcome.file)
                    if isinstance(outcome, ShardDone) and name:
                        self.whole[name] = outcome
                        self.note()
                        halfway.forget(outcome.file)  # where an engine did not go on with it
                    yield outcome

        return missing

    def _kept(self, task: ShardTask) -> ShardDone | None:
        """What is known of a task's file, where that is there as the task would write it."""
        found = self.whole.get(self._name(task.file))
        return found if found is not None and is_written(task, found) else None

    def _name(self, file: Path) -> str:
        """What a file of this model is called in the journal; nothing for one of another."""
        return file.relative_to(self.directory).as_posix() if file.is_relative_to(self.directory) else ""

    def note(self) -> None:
        """Bring the journal to the disk."""
        files = {name: _said(done) for name, done in self.whole.items()}
        write_json(_journal_of(self.directory), {"format": FORMAT, "job": self.job, "files": files})


@contextmanager
def resumable(out: Path, job: Job, *, resume: bool) -> Iterator[Unfinished]:
    """A model to write, which becomes `out` when the block ends well.

    When it does not, files that are whole are kept where the same again may succeed: after Ctrl-C, or when the
    disk was full or failed. Otherwise nothing is left. Without `resume` what a dead process left is removed.

    Raises:
        CheckpointError: `out` is not a new or empty directory, another process writes it, or what is left is
            another job's.
        DiskError: it cannot be written; it says what was kept.
    """
    final = out.expanduser().resolve()
    check_free(final, out)
    place = beside(final)
    made = [parent for parent in final.parents if not parent.exists()]
    with writing(out):
        place.mkdir(parents=True, exist_ok=True)
    with locked(place, f"merging into {out}"):
        found = _begun(place, job, resume=resume)
        try:
            found.note()
            yield found
            with writing(out):
                flush(place)
                place.rename(final)
                sync_directory(final.parent)
        except BaseException as error:
            _stop(found, made, error)
            raise
        discard(_journal_of(place))


def is_finished(out: Path, job: Job) -> bool:
    """Whether the job had become `out` when its process died; what it left besides is removed.

    Raises:
        CheckpointError: the journal cannot be understood.
    """
    final = out.expanduser().resolve()
    place = beside(final)
    said = None if place.exists() or not final.exists() else _journal(place)
    if said is None or said["job"] != job:
        return False
    discard(_journal_of(place))
    return True


def beside(final: Path) -> Path:
    """Where a directory is written until it is whole."""
    return final.with_name(f".{final.name}.partial")


def _journal_of(place: Path) -> Path:
    return place.with_name(f"{place.name}.json")


def _begun(place: Path, job: Job, *, resume: bool) -> Unfinished:
    """What is there to go on with; everything else is removed."""
    _check_ours(place)
    said = _journal(place) if resume else None
    if said is not None:
        _check_same(place, said["job"], job)
    found = Unfinished(place, job, {} if said is None else _whole(place, said["files"]))
    sweep(found, [] if said is None else _halves(place))
    return found


def _check_ours(place: Path) -> None:
    if any(place.iterdir()) and not _journal_of(place).is_file():
        raise CheckpointError(
            f"{place} is where the merge would be written, and holds what no merge wrote. Move it away; "
            "nothing was changed."
        )


def _check_same(place: Path, before: Job, now: Job) -> None:
    other = [word for word in {**before, **now} if before.get(word) != now.get(word)]
    if other:
        raise CheckpointError(
            f"{place} holds another merge: it differs in {listing(other)}. Repeat that one, or leave out `--resume` to "
            "begin anew; nothing was changed."
        )


def _journal(place: Path) -> dict[str, Any] | None:
    """What the journal says; None where there is none.

    Raises:
        CheckpointError: it cannot be understood.
    """
    file = _journal_of(place)
    if not file.is_file():
        return None
    try:
        said = json.loads(file.read_bytes())
        if said["format"] != FORMAT or not isinstance(said["job"], dict):
            raise ValueError(f"its format is not {FORMAT!r}")
        _whole(place, said["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} cannot be understood ({error!s:.80}). Leave out `--resume` to begin anew; nothing was changed."
        ) from error
    return dict(said)


def _said(done: ShardDone) -> dict[str, Any]:
    tallies = {name: asdict(tally) for name, tally in done.tallies.items()}
    return {**{word: getattr(done, word) for word in WORDS}, "tallies": tallies}


def _whole(place: Path, files: Mapping[str, Mapping[str, Any]]) -> dict[str, ShardDone]:
    return {
        name: ShardDone(
            place / name,
            tallies={tensor: Tally(**told) for tensor, told in said["tallies"].items()},
            **{word: said[word] for word in WORDS} | {"sums": tuple(said["sums"])},
        )
        for name, said in files.items()
    }


def sweep(found: Unfinished, parts: Iterable[Path] = ()) -> None:
    """Remove what is not known to be whole, nor part of a file that can be gone on with."""
    spared = {*parts, *(found.directory / name for name in found.whole)}
    with writing(found.directory):
        for file in found.directory.rglob("*"):
            if not file.is_dir() and file not in spared:
                file.unlink()


def _halves(directory: Path) -> list[Path]:
    """The parts of all files in the making that can be gone on with."""
    begun = (
        note.with_name(note.name[1 : -len(halfway.NOTE)]) for note in directory.rglob(f".[!.]*{halfway.NOTE}")
    )
    return [part for file in begun for part in halfway.parts(file)]


def _stop(found: Unfinished, made: list[Path], error: BaseException) -> None:
    """Keep what is whole where that helps, and say so; otherwise leave nothing."""
    halves = _halves(found.directory)
    with suppress(CheckpointError):
        sweep(found, halves)
    count = sum((found.directory / name).is_file() for name in found.whole)
    if not (count or halves) or not isinstance(
        error, DiskError | KeyboardInterrupt | SystemExit | MemoryError
    ):
        shutil.rmtree(found.directory, ignore_errors=True)
        with suppress(CheckpointError):
            discard(_journal_of(found.directory))
        remove_empty(made)
        return
    whole = f"{count} whole file{'s are' if count > 1 else ' is'}" if count else "part of a file is"
    kept = f"{whole} kept in {found.directory}: go on with `--resume`"
    if isinstance(error, DiskError):
        raise DiskError(error.fact, error.remedy, kept) from error.__cause__
    if isinstance(error, KeyboardInterrupt):
        raise KeyboardInterrupt(f"Interrupted; {kept}, or run without it to begin anew.") from None
