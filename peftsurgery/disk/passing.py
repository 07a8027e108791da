"""Jobs by several threads, and others that write what they make: who computes does not wait for the disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack

from peftsurgery.disk.jobs import Job, Ran
from peftsurgery.disk.output import Output, put
from peftsurgery.disk.rooms import Room
from peftsurgery.workers import workers

UnderWay = tuple[Job, Room, Future[Ran]]
WAITING = 4
"""Rooms that wait to be written, or to be filled, while every thread fills another."""


def carry_out(
    todo: Iterable[Job],
    out: Output,
    done: Callable[[Job, Ran], None],
    *,
    threads: int,
    device: str = "cpu",
    measure: int = 0,
) -> None:
    """Run the jobs, and write what they make in their order; two at a time where they are made faster than written.

    Args:
        done: called with every job whose bytes are in the file, and what it did.
        threads: how many compute, beside the one that calls.
        measure: every how many-th tile is measured, to tell how far its tensor moved; 0 for none.

    Raises:
        CheckpointError: a file cannot be read or written.
        NonFiniteWeight: folding gave a NaN or an infinity.
    """
    free = [Room() for _ in range(threads + WAITING)]
    under_way: deque[UnderWay] = deque()

    def finish() -> None:
        ready = _ready(under_way)
        _write_all(out, ready, pen)
        for job, room, future in ready:
            free.append(room)
            done(job, future.result())

    with ThreadPoolExecutor(1) as pen, workers(threads) as pool:
        for job in todo:
            if not free:
                finish()
            room = free.pop()
            under_way.append((job, room, pool.submit(job.run, out, room, device=device, measure=measure)))
        while under_way:
            finish()


def _ready(under_way: deque[UnderWay]) -> list[UnderWay]:
    """The oldest one, which may not be made yet, and the next one where both are."""
    count = 2 if len(under_way) > 1 and under_way[0][2].done() and under_way[1][2].done() else 1
    return [under_way.popleft() for _ in range(count)]


def _write_all(out: Output, ready: Sequence[UnderWay], pen: Executor) -> None:
    """Write what they make, the first one by the thread that calls, another one by `pen` meanwhile."""
    (first, _, made), *others = ready
    with ExitStack() as beside:
        for job, _, future in others:
            beside.callback(pen.submit(_write, out, job, future).result)
        _write(out, first, made)


def _write(out: Output, job: Job, made: Future[Ran]) -> None:
    data = made.result().data
    if data is not None:
        put(out, job.start, data)
