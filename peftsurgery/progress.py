"""Progress bars on stderr, for whoever listens with them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from peftsurgery.events import Event, Listener, ignore


@contextmanager
def bars(*, quiet: bool = False) -> Iterator[Listener]:
    """A listener that draws one bar per verb on stderr; silent when quiet or where stderr is no terminal."""
    if quiet or not sys.stderr.isatty():
        yield ignore
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:<8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[last]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        known: dict[str, object] = {}

        def listen(event: Event) -> None:
            if event.verb not in known:
                known[event.verb] = progress.add_task(event.verb, total=event.total, last="")
            progress.update(known[event.verb], completed=event.done, total=event.total, last=event.name)  # type: ignore[arg-type]

        yield listen
