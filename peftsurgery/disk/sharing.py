"""Weight files that several models of one base share, so that many merged models do not cost as many bases.

A file is shared whole, and a loader may read all that a file holds. So tensors that an adapter touches never lie in a
file with others: the untouched ones are written once, into a store beside the models, and every model has them as files
of its own name with the same bytes. Files are called and indexed as those of any model.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from peftsurgery.disk.checkpoint import Checkpoint
from peftsurgery.disk.durable import discard
from peftsurgery.disk.identity import stamp
from peftsurgery.disk.parts import cut, file_names
from peftsurgery.disk.pieces import Piece
from peftsurgery.disk.shard import Shard, Stored, read_shard
from peftsurgery.disk.writer import ShardTask
from peftsurgery.errors import TruncatedShard

STORE = ".shared"
PLAIN = {"format": "pt"}
"""The metadata of a file that belongs to several models."""

Key = tuple[str, torch.dtype, Path, int]
"""A tensor of an output that is a tensor of the base: its name and dtype, and where it comes from."""


@dataclass(frozen=True, slots=True)
class Sharing:
    """How the models of a fleet are laid out.

    Args:
        store: the directory of the files that they share.
        groups: the tensors that are shared; those of a group are in the same models.
        most: bytes of tensors in a file.
    """

    store: Path
    groups: tuple[frozenset[Key], ...]
    most: int

    def arranged(self, tasks: Sequence[ShardTask], directory: Path) -> tuple[ShardTask, ...]:
        """The tasks of one model, its shared files first, each with its twin in the store."""
        shared, own = self._parted(tasks)
        common = replace(tasks[0], metadata=PLAIN)
        mine = next((task for task in tasks if any(piece.changes for piece in task.pieces)), tasks[0])
        files = [
            *(
                replace(common, pieces=some, twin=self._twin(some))
                for group in shared
                for some in cut(group, self.most)
            ),
            *(replace(mine, pieces=some) for some in cut(own, self.most)),
        ]
        names = file_names(len(files))
        return tuple(replace(task, file=directory / name) for task, name in zip(files, names, strict=True))

    def missing(self, tasks: Sequence[ShardTask]) -> dict[Path, ShardTask]:
        """The tasks that write the twins of a model's arranged tasks, where they are not there yet.

        The files cannot be written to: through a hard link every model would change.
        """
        return {
            task.twin: replace(task, file=task.twin, twin=None, mode=_read_only(task.mode))
            for task in tasks
            if task.twin is not None and not _is_there(task.twin, task.pieces)
        }

    @property
    def nbytes(self) -> int:
        """The size of what is in the store."""
        return sum(file.stat().st_size for file in self._files())

    def prune(self) -> None:
        """Remove from the store what no model has under another name, and the store where nothing is left."""
        for file in self._files():
            if file.stat().st_nlink == 1:
                discard(file)
        with suppress(OSError):  # it is not there, or holds something
            self.store.rmdir()

    def _files(self) -> list[Path]:
        return [file for file in self.store.iterdir() if file.is_file()] if self.store.is_dir() else []

    def _parted(self, tasks: Sequence[ShardTask]) -> tuple[list[list[Piece]], list[Piece]]:
        """The pieces of each group that the model shares, and its own."""
        group: dict[Key | None, int] = {
            key: number for number, keys in enumerate(self.groups) for key in keys
        }
        shared: dict[int, list[Piece]] = defaultdict(list)
        own: list[Piece] = []
        for piece in _pieces(tasks):
            number = group.get(_key(piece))
            (own if number is None else shared[number]).append(piece)
        return [shared[number] for number in sorted(shared)], own

    def _twin(self, pieces: Sequence[Piece]) -> Path:
        """The file of the store that holds these tensors of this base, and can hold nothing else."""
        said = [_told(piece) for piece in pieces]
        return self.store / f"{hashlib.sha256(json.dumps(said).encode()).hexdigest()[:32]}.safetensors"


def untouched(tasks: Sequence[ShardTask]) -> tuple[Key, ...]:
    """The tensors of a model that are the base's own, in their order."""
    return tuple(key for piece in _pieces(tasks) if (key := _key(piece)) is not None)


def groups(models: Iterable[tuple[Key, ...]]) -> tuple[frozenset[Key], ...]:
    """The untouched tensors of all models, those together that are untouched in the same models."""
    where: dict[Key, list[int]] = defaultdict(list)
    for number, keys in enumerate(dict.fromkeys(models)):
        for key in keys:
            where[key].append(number)
    found: dict[tuple[int, ...], set[Key]] = defaultdict(set)
    for key, numbers in where.items():
        found[tuple(numbers)].add(key)
    return tuple(frozenset(keys) for keys in found.values())


def with_twins(tasks: Sequence[ShardTask], checkpoint: Checkpoint) -> tuple[ShardTask, ...]:
    """The tasks, those that would write a file of the base again with that file as their twin."""
    whole: dict[tuple[Stored | None, ...], Shard] = {
        tuple(shard.tensors): shard for shard in checkpoint.shards if shard.metadata.get("format") == "pt"
    }
    twins = ((task, whole.get(tuple(_as_stored(task.pieces)))) for task in tasks)
    return tuple(task if shard is None else replace(task, twin=shard.file) for task, shard in twins)


def _as_stored(pieces: Sequence[Piece]) -> Iterable[Stored | None]:
    return ((stored if (stored := p.copied) and stored.name == p.name else None) for p in pieces)


def _pieces(tasks: Sequence[ShardTask]) -> Iterable[Piece]:
    return (piece for task in tasks for piece in task.pieces)


def _key(piece: Piece) -> Key | None:
    origin = piece.origin
    if piece.changes or not isinstance(origin, Stored):
        return None
    return piece.name, piece.dtype, origin.file, origin.start


def _read_only(mode: int | None) -> int:
    return (0o644 if mode is None else mode) & 0o444


def _told(piece: Piece) -> list[object]:
    """What a tensor of the base is known by; another base in the same place has another inode or time."""
    assert isinstance(piece.origin, Stored)
    return [piece.name, str(piece.dtype), *stamp(piece.origin.file), piece.origin.start]


def _is_there(file: Path, pieces: Sequence[Piece]) -> bool:
    try:
        held = read_shard(file).tensors if file.is_file() else ()
    except TruncatedShard:
        return False
    return [(s.name, s.torch_dtype, s.shape) for s in held] == [(p.name, p.dtype, p.shape) for p in pieces]
