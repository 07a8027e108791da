"""A checkpoint that is going to be written: which file holds what, and the index that says so."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import torch

from peftsurgery.changes import Change
from peftsurgery.disk.checkpoint import INDEX, SINGLE, Checkpoint, Shard
from peftsurgery.disk.durable import write_json
from peftsurgery.disk.engines import Engine, Failed
from peftsurgery.disk.pieces import Piece
from peftsurgery.disk.writer import ShardDone, ShardTask
from peftsurgery.errors import CheckpointError
from peftsurgery.events import Event, Listener
from peftsurgery.tally import Tally

Changes = Mapping[str, tuple[Change, ...]]


@dataclass(frozen=True, slots=True)
class Written:
    """What lies on the disk now.

    Args:
        files: the weight files, and the index where there is one.
        nbytes: the size of all tensors.
        tallies: how far every touched tensor moved, where that was asked for.
    """

    files: tuple[str, ...]
    nbytes: int
    num_tensors: int
    tallies: Mapping[str, Tally]


def outline(
    checkpoint: Checkpoint,
    directory: Path,
    rename: Callable[[str], str | None],
    *,
    changes: Changes | None = None,
    dtype: torch.dtype | None = None,
    added: Sequence[Piece] = (),
    max_shard_size: int | None = None,
) -> tuple[ShardTask, ...]:
    """The tasks that write `checkpoint` into `directory`: the same tensors in the same order.

    Args:
        rename: the new name of a tensor; None leaves it out, and a file without tensors too.
        changes: what is folded into them, by their new names.
        dtype: of every floating tensor; its own by default.
        added: new tensors, at the end of the last file.
        max_shard_size: bytes of tensors in a file, which a larger tensor has for itself; by default the files
            are those of the checkpoint.

    Raises:
        CheckpointError: two tensors would get the same name.
    """
    tasks = [
        _task(checkpoint.path, shard, directory, rename, changes or {}, dtype) for shard in checkpoint.shards
    ]
    tasks = [task for task in tasks if task.pieces]
    if added and tasks:
        tasks[-1] = replace(tasks[-1], pieces=(*tasks[-1].pieces, *added))
    _check_unique(piece.name for task in tasks for piece in task.pieces)
    return tuple(tasks) if max_shard_size is None else _resharded(tasks, directory, max_shard_size)


def written(tasks: Sequence[ShardTask], engine: Engine, listen: Listener) -> list[ShardDone]:
    """Have an engine write the files.

    Raises:
        NonFiniteWeight: folding gave a NaN or an infinity.
        CheckpointError: a file cannot be read or written.
    """
    with closing(engine(tasks, counted(tasks, listen))) as outcomes:
        return [_whole(outcome) for outcome in outcomes]


def _whole(outcome: ShardDone | Failed) -> ShardDone:
    if isinstance(outcome, Failed):
        raise outcome.error
    return outcome


def finish(
    directory: Path, tasks: Sequence[ShardTask], done: Iterable[ShardDone], index: Mapping[str, object] | None
) -> Written:
    """Write the index, of several files or of a base that has one, over files that are there; say what lies there."""
    files = [task.file.relative_to(directory).as_posix() for task in tasks]
    nbytes = sum(task.nbytes for task in tasks)
    pieces = [piece for task in tasks for piece in task.pieces]
    tallies = {name: tally for shard in done for name, tally in shard.tallies.items()}
    if files != [SINGLE] and (index is not None or len(files) > 1):
        write_json(directory / INDEX, _index(tasks, files, index or {}, nbytes))
        files.append(INDEX)
    return Written(tuple(files), nbytes, len(pieces), tallies)


def written_dtype(dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """What a tensor of `dtype` is written as: only floating ones change."""
    return wanted if wanted is not None and dtype.is_floating_point else dtype


def _task(
    root: Path,
    shard: Shard,
    directory: Path,
    rename: Callable[[str], str | None],
    changes: Changes,
    dtype: torch.dtype | None,
) -> ShardTask:
    kept = [(name, stored) for stored in shard.tensors if (name := rename(stored.name)) is not None]
    pieces = tuple(
        Piece(name, written_dtype(stored.torch_dtype, dtype), stored, changes.get(name, ()))
        for name, stored in kept
    )
    file = directory / shard.file.relative_to(root)
    return ShardTask(
        file, pieces, {**shard.metadata, "format": "pt"}, stat.S_IMODE(shard.file.stat().st_mode)
    )


def _resharded(tasks: Sequence[ShardTask], directory: Path, most: int) -> tuple[ShardTask, ...]:
    """The same pieces in files of at most that many bytes, with transformers' names."""
    groups = cut((piece for task in tasks for piece in task.pieces), most)
    return tuple(
        replace(tasks[0], file=directory / file, pieces=group)
        for file, group in zip(file_names(len(groups)), groups, strict=True)
    )


def cut(pieces: Iterable[Piece], most: int) -> list[tuple[Piece, ...]]:
    """The pieces in files of at most that many bytes, in order; a larger one has a file for itself."""
    groups: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        if not groups or piece.nbytes > room:
            groups.append([])
            room = most
        groups[-1].append(piece)
        room -= piece.nbytes
    return [tuple(group) for group in groups]


def file_names(count: int) -> list[str]:
    """What transformers calls that many weight files of a model."""
    return (
        [SINGLE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    )


def _check_unique(names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise CheckpointError(
                f"Two tensors of the base would both be called {name!r}. Nothing was written."
            )
        seen.add(name)


def counted(tasks: Sequence[ShardTask], listen: Listener) -> Listener:
    """Tells `listen` of all tasks together what each says of itself."""
    pieces = [piece for task in tasks for piece in task.pieces]
    totals = {"write": len(pieces), "fold": sum(bool(piece.changes) for piece in pieces)}
    counts = {verb: count(1) for verb in totals}

    def told(event: Event) -> None:
        listen(replace(event, done=next(counts[event.verb]), total=totals[event.verb]))

    return told


def _index(
    tasks: Sequence[ShardTask], files: Sequence[str], metadata: Mapping[str, object], nbytes: int
) -> dict[str, object]:
    said = {**metadata, "total_size": nbytes}
    if "total_parameters" in metadata:
        said["total_parameters"] = sum(piece.numel for task in tasks for piece in task.pieces)
    places = {piece.name: file for task, file in zip(tasks, files, strict=True) for piece in task.pieces}
    return {"metadata": said, "weight_map": dict(sorted(places.items()))}
