"""Which models of a fleet are whole: what lets an interrupted one go on.

A model is noted just before it gets its name, in one step. So one that is noted and has its name is whole, and it is
that of the job that was noted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftsurgery.disk.durable import write_json
from peftsurgery.errors import CheckpointError

JOURNAL = ".fleet.json"


def noted(directory: Path) -> dict[str, str]:
    """The models of a fleet's directory, by name, and what job each is of.

    Raises:
        CheckpointError: the journal cannot be read.
    """
    file = directory / JOURNAL
    if not file.is_file():
        return {}
    try:
        return {str(name): str(job) for name, job in json.loads(file.read_bytes())["models"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} cannot be understood ({error!s:.80}). Move it away, and merge into another directory; "
            "nothing was changed."
        ) from error


def note(directory: Path, name: str, job: str) -> None:
    """Note the model that is about to get its name."""
    kept = {one: other for one, other in noted(directory).items() if (directory / one).exists()}
    write_json(directory / JOURNAL, {"models": dict(sorted({**kept, name: job}.items()))})


def digest(words: Mapping[str, Any]) -> str:
    """What a job is known by, of everything that its output depends on."""
    return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()
