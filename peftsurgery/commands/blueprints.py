"""Blueprints that were drawn once: asking transformers takes a second or two, and importing it a hundred megabytes.

A blueprint depends on `config.json`, the names of the tensors, the task, and the code that draws it. Under the digest
of all of these it is kept in `$PEFTSURGERY_CACHE`, or else `peftsurgery` in the user's cache directory; so what is
found there is what would be drawn. It holds names and shapes, no weights. An empty `PEFTSURGERY_CACHE=` keeps nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path

from peftsurgery import live
from peftsurgery.disk.checkpoint import Checkpoint
from peftsurgery.disk.durable import replace
from peftsurgery.errors import CheckpointError
from peftsurgery.live.blueprint import Blueprint, draw
from peftsurgery.tasks import Task

CACHE = "PEFTSURGERY_CACHE"
CODE = ("transformers", "torch")
"""The libraries whose version decides what is drawn."""


def blueprint(
    checkpoint: Checkpoint, *, task: Task | None, labels: int | None, trust_remote_code: bool
) -> Blueprint:
    """What the checkpoint becomes, as remembered or drawn; code that it brings itself is always asked.

    Raises:
        CheckpointError: its configuration is not understood, or has no class for the task.
    """
    names = tuple(checkpoint.tensors)
    file = None if trust_remote_code else _place(checkpoint.path, names, task, labels)
    found = None if file is None else _remembered(file)
    if found is None:
        found = draw(checkpoint.path, names, task=task, labels=labels, trust_remote_code=trust_remote_code)
        if file is not None:
            _remember(file, found)
    return found


def _place(path: Path, names: tuple[str, ...], task: Task | None, labels: int | None) -> Path | None:
    """The file for it; None where nothing is kept."""
    root = os.environ.get(CACHE)
    if root == "" or not (path / "config.json").is_file():
        return None
    home = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "peftsurgery")
    asked = [names, repr(task), labels, [version(name) for name in CODE], _own_code()]
    digest = hashlib.sha256((path / "config.json").read_bytes() + json.dumps(asked).encode())
    return home.expanduser() / f"{digest.hexdigest()}.json"


@cache
def _own_code() -> str:
    """A digest of what draws."""
    files = sorted(Path(live.__path__[0]).glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _remembered(file: Path) -> Blueprint | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        return _read(file, file.stat().st_mtime_ns)
    return None


@lru_cache(maxsize=4)
def _read(file: Path, modified: int) -> Blueprint:
    """What is in a file, asked once of one that does not change."""
    return Blueprint.from_json(json.loads(file.read_bytes()))


def _remember(file: Path, found: Blueprint) -> None:
    with suppress(OSError, CheckpointError):  # a cache that cannot be written costs time only
        file.parent.mkdir(parents=True, exist_ok=True)
        replace(file, json.dumps(found.to_json()).encode())
