"""Files written by the nodes of a Ray cluster that see the same file system.

A task is a pure function of what it carries, so it can run on any node, and again after a node is lost: the bits are
those of a file that was written here.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

from peftsurgery.disk.durable import discard, rename
from peftsurgery.disk.engines import Engine, Failed, Outcomes
from peftsurgery.disk.pieces import Piece
from peftsurgery.disk.progress import tell_all
from peftsurgery.disk.shard import Stored
from peftsurgery.disk.writer import ShardDone, ShardTask, write_shard
from peftsurgery.errors import CheckpointError, PlanError, SurgeryError, cause
from peftsurgery.events import Listener

RETRIES = 3
"""How often a file is begun again that a lost worker left unfinished."""
THREADS = 2
"""Of one task, which has one core: one computes while the other waits for the disk."""
PATIENCE = 10
"""Seconds for a task to end that was asked to; then its worker is ended."""
STORE = 128 << 20
"""Bytes of shared memory for our own Ray, through which only tasks and what became of them pass."""


@contextmanager
def cluster() -> Iterator[Engine]:
    """The engine, on the Ray that this process is connected to, on `RAY_ADDRESS`, or on one started for the block.

    Raises:
        PlanError: Ray is not installed, or the cluster does not answer.
    """
    try:
        import ray
    except ImportError as error:
        raise PlanError(
            "`--engine ray` needs Ray, which is not installed. Install it with `pip install 'ray>=2.60,<3'`; "
            "nothing was written."
        ) from error
    if ray.is_initialized():
        yield partial(_on, ray)
        return
    _connect(ray)
    try:
        yield partial(_on, ray)
    finally:
        ray.shutdown()


def _connect(ray: Any) -> None:
    address = os.environ.get("RAY_ADDRESS", "local")
    own = {"include_dashboard": False, "_node_ip_address": "127.0.0.1", "object_store_memory": STORE}
    try:
        ray.init(address, log_to_driver=False, logging_level="error", **(own if address == "local" else {}))
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise PlanError(
            f"No Ray answers at {address!r} ({cause(error)}). Check RAY_ADDRESS, or leave it away to start one here; "
            "nothing was written."
        ) from error


def _on(ray: Any, tasks: Sequence[ShardTask], listen: Listener) -> Outcomes:
    remote = ray.remote(num_cpus=1, max_retries=RETRIES)(RUNS)
    running = {remote.options(name=task.file.name).remote(portable(task)): task for task in tasks}
    try:
        while running:
            (ready,), _ = ray.wait(list(running), num_returns=1)
            task = running.pop(ready)
            outcome = _outcome(ray, ready, task)
            _clear(task)
            if isinstance(outcome, ShardDone):
                tell_all(task.pieces, listen)
            yield outcome
    finally:
        _stop(ray, list(running))


def attempt(task: ShardTask) -> ShardDone | Failed:
    """What runs on a node; an error of the task's own is an answer, and no reason to try again.

    A node that was given up may still be writing, so every attempt has a file of its own until that is whole.
    """
    own = task.file.with_name(f".{task.file.name}.{secrets.token_hex(4)}")
    try:
        done = write_shard(replace(task, file=own))
        rename(own, task.file)
        return done
    except SurgeryError as error:
        return Failed(task.file, error)


RUNS = attempt
"""What every task is sent to; another one in tests that kill it."""


def _clear(task: ShardTask) -> None:
    """Remove what lost attempts have left."""
    for file in task.file.parent.glob(f".{task.file.name}.*"):
        discard(file)


def portable(task: ShardTask) -> ShardTask:
    """The task for a process that stands in another directory."""
    twin = None if task.twin is None else task.twin.absolute()
    pieces = tuple(_portable(piece) for piece in task.pieces)
    return replace(task, file=task.file.absolute(), twin=twin, pieces=pieces, threads=THREADS)


def _portable(piece: Piece) -> Piece:
    if not isinstance(piece.origin, Stored):
        return piece
    return replace(piece, origin=replace(piece.origin, file=piece.origin.file.absolute()))


def _outcome(ray: Any, ready: Any, task: ShardTask) -> ShardDone | Failed:
    try:
        found: ShardDone | Failed = ray.get(ready)
    except ray.exceptions.RayError as error:
        why = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
        return Failed(task.file, _lost(task, cause(why)))
    if isinstance(found, ShardDone) and not _is_here(task, found):
        return Failed(task.file, _lost(task, "the node that wrote it sees another file system"))
    return replace(found, file=task.file)


def _is_here(task: ShardTask, done: ShardDone) -> bool:
    with suppress(OSError):
        return task.file.stat().st_size == done.nbytes
    return False


def _lost(task: ShardTask, why: str) -> CheckpointError:
    return CheckpointError(
        f"Ray did not write {task.file.name}: {why}. Give it directories that every node sees, or write here with "
        "`--engine local`; nothing was kept."
    )


def _stop(ray: Any, running: Sequence[Any]) -> None:
    """Cancel what runs, and wait until it does no longer, for its directory is about to go."""
    for force in (False, True):
        for one in running:
            ray.cancel(one, force=force)
        if running:
            _, running = ray.wait(running, num_returns=len(running), timeout=PATIENCE)
