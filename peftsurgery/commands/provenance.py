"""What `peftsurgery.json` says of a merge: what was folded into what."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peftsurgery import __version__
from peftsurgery.adapter import Adapter

PROVENANCE = "peftsurgery.json"


def provenance(
    model: str | Path, adapters: Sequence[Adapter], folded: Sequence[str], added: Sequence[str]
) -> dict[str, object]:
    """The words for it, as JSON values."""
    said = [
        {"name": a.name, "methods": sorted({repr(s.method) for s in a.plan.steps}), "base": a.base}
        for a in adapters
    ]
    return {
        "peftsurgery": __version__,
        "verb": "merge",
        "base": Path(model).name,
        "adapters": said,
        "folded": list(folded),
        "added": list(added),
    }
