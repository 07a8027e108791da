"""Is it the base, and are they the adapters, that a merged model says that it was made from?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any

from peftsurgery.adapter import fingerprint
from peftsurgery.commands.adapter_files import Given
from peftsurgery.commands.provenance import PROVENANCE
from peftsurgery.disk.checkpoint import Checkpoint
from peftsurgery.disk.identity import Identity, known
from peftsurgery.errors import CheckpointError, ParityError, PlanError, listing


def check_base(merged: str | Path, base: Checkpoint, said: Mapping[str, Any]) -> None:
    """Compare the base's files with what the merged model says of them; all bytes where it has their SHA-256.

    Raises:
        ParityError: it is another base.
        CheckpointError: what it says cannot be understood.
    """
    before = _identities(merged, said)
    here = {shard.file.relative_to(base.path).as_posix(): shard.file for shard in base.shards}
    other = [
        name
        for name in {**before, **here}
        if name not in before
        or name not in here
        or not before[name].matches(known(here[name], full=before[name].sha256 is not None))
    ]
    if other:
        raise _another(
            f"{base.path} is not the base of {merged}: {listing(other)} is another file than {PROVENANCE} says. "
            f"Give the base that was merged into, which was called {said.get('base')!r}.",
            other[0],
        )


def check_adapters(
    merged: str | Path, given: Sequence[Given], said: Mapping[str, Any], *, weighted: bool
) -> tuple[Given, ...]:
    """Compare adapters with what the merged model says of its own; they get its weights where none were said.

    Args:
        weighted: whether their weights were said.

    Raises:
        ParityError: one is another adapter.
        PlanError: some are missing.
    """
    left = [dict(one) for one in said["adapters"]]
    found = []
    for one in given:
        mark = fingerprint(one.adapter)
        match = next((told for told in left if told.get("fingerprint") == mark), None)
        if match is None:
            raise _another(
                f"{one.path or one.adapter.name} is none of the adapters that are merged in {merged}, or was trained "
                f"since: {PROVENANCE} names {listing(_names(said['adapters']))}. Give those.",
                one.adapter.name,
            )
        left.remove(match)
        found.append(one if weighted else replace(one, weight=float(match["weight"])))
    if left:
        raise PlanError(
            f"{merged} has {listing(_names(left))} merged in it too. Name every adapter: `--adapter ADAPTER`."
        )
    return tuple(found)


def _identities(merged: str | Path, said: Mapping[str, Any]) -> dict[str, Identity]:
    try:
        return {name: Identity.from_dict(one) for name, one in said["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{PROVENANCE} of {merged} cannot be understood ({error!s:.80}). Remove it to compare bits alone."
        ) from error


def _names(adapters: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f"{one.get('name')} x {one.get('weight')}" for one in adapters]


def _another(message: str, name: str) -> ParityError:
    return ParityError(message, max_abs_diff=nan, tolerance=0.0, output=name)
