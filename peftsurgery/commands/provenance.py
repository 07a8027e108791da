"""What `peftsurgery.json` says of a merge: what was folded into what, and how far that moved it."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peftsurgery import __version__
from peftsurgery.adapter import fingerprint
from peftsurgery.commands.adapter_files import Given
from peftsurgery.disk.checkpoint import Checkpoint
from peftsurgery.disk.identity import Identity, Stamp, known, stamp
from peftsurgery.errors import CheckpointError
from peftsurgery.tally import Tally

PROVENANCE = "peftsurgery.json"
LIBRARIES = ("torch", "transformers")


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """What a merge is made from, as it was when the merge began.

    Args:
        base: for every weight file of the base its stamp.
        tuned: for every weight file of the adapters theirs.
        fingerprints: of the adapters, before they were scaled.
    """

    checkpoint: Checkpoint
    given: tuple[Given, ...]
    base: Mapping[Path, Stamp]
    tuned: Mapping[Path, Stamp]
    fingerprints: tuple[str, ...]

    def identities(self, *, full: bool = False) -> dict[str, Identity]:
        """The base's files, by name.

        Args:
            full: with the SHA-256 of all their bytes.
        """
        root = self.checkpoint.path
        return {file.relative_to(root).as_posix(): known(file, full=full) for file in self.base}

    def check_unchanged(self) -> None:
        """Raise a CheckpointError for a base or an adapter that was written to since."""
        for file, before in {**self.base, **self.tuned}.items():
            if stamp(file) != before:
                raise CheckpointError(
                    f"{file} changed while it was being merged. Wait until nothing writes to it and run again; "
                    "nothing was kept."
                )

    def label(self) -> dict[str, str]:
        """What a file that holds merged tensors says of itself, in its metadata."""
        said = json.dumps([one.to_dict() for one in self.identities().values()])
        base = hashlib.sha256(said.encode()).hexdigest()
        with_ = (
            f"{mark[:12]} x {one.weight}" for mark, one in zip(self.fingerprints, self.given, strict=True)
        )
        return {"peftsurgery": f"merge of base {base[:12]} with {', '.join(with_)}"}


def inputs(checkpoint: Checkpoint, given: Sequence[Given]) -> Inputs:
    """What a merge is about to be made from."""
    return Inputs(
        checkpoint,
        tuple(given),
        {shard.file: stamp(shard.file) for shard in checkpoint.shards},
        {file: stamp(file) for one in given for file in one.files.values()},
        tuple(fingerprint(one.adapter) for one in given),
    )


def provenance(
    model: str | Path,
    source: Inputs,
    folded: Sequence[str],
    added: Sequence[str] = (),
    *,
    full: bool = False,
    options: Mapping[str, object] | None = None,
) -> dict[str, Any]:
    """The words for it, as JSON values; the same for the same inputs, whenever and wherever it is done.

    Args:
        full: say the SHA-256 of all bytes of the base's files.
        options: of the merge.
    """
    return {
        "peftsurgery": __version__,
        "verb": "merge",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "base": Path(model).name,
        "files": {name: one.to_dict() for name, one in source.identities(full=full).items()},
        "adapters": [
            adapter_words(one, mark, full=full)
            for one, mark in zip(source.given, source.fingerprints, strict=True)
        ],
        "options": dict(options or {}),
        "folded": list(folded),
        "added": list(added),
    }


def vanished(tallies: Mapping[str, Tally]) -> list[str]:
    """The tensors in which as good as nothing of the adapters is stored."""
    return sorted(name for name, tally in tallies.items() if tally.vanished)


def adapter_words(one: Given, mark: str, *, full: bool = False) -> dict[str, Any]:
    """What is said of an adapter, whose fingerprint is `mark`."""
    adapter = one.adapter
    return {
        "name": adapter.name,
        "weight": one.weight,
        "methods": sorted({repr(step.method) for step in adapter.plan.steps}),
        "base": adapter.base,
        "fingerprint": mark,
        "files": {name: known(file, full=full).to_dict() for name, file in one.files.items()},
    }


def recorded(merged: Path) -> dict[str, Any] | None:
    """What a merged model says of how it was made; None where it says nothing that is understood."""
    file = merged / PROVENANCE
    try:
        said = json.loads(file.read_bytes()) if file.is_file() else None
    except (OSError, ValueError):
        return None
    if isinstance(said, dict) and said.get("verb") != "merge":  # an export stands beside it, and has kept it
        said = said.get("model")
    return said if isinstance(said, dict) and said.get("verb") == "merge" and "files" in said else None
