"""A checkpoint merged as commands do it, without what commands put around it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftsurgery.adapter import Adapter
from peftsurgery.disk.checkpoint import Checkpoint
from peftsurgery.disk.engines import local
from peftsurgery.disk.merge import Merged, finished, plan
from peftsurgery.disk.parts import written
from peftsurgery.events import Listener, ignore


def merge(
    checkpoint: Checkpoint,
    adapters: Sequence[Adapter],
    directory: Path,
    listen: Listener = ignore,
    **words: Any,
) -> Merged:
    """Write it into an existing directory; the other words are those of `plan`."""
    planned = plan(checkpoint, adapters, directory, **words)
    return finished(directory, planned, written(planned.tasks, local, listen))
