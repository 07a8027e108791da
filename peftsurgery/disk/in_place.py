"""Patching a checkpoint where it lies, with the discipline of a database.

Before the first byte is patched, the undo file is whole on the disk, a marker stands beside the model, and the
files by which a loader finds a model have hidden names. They get their names back when every patched byte is on
the disk, and the marker goes last. A model with a marker is made whole from its undo file, whatever was done.
"""

from __future__ import annotations

import itertools
import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from peftsurgery.adapter import Adapter
from peftsurgery.changes import Change
from peftsurgery.disk.checkpoint import INDEX, SINGLE, Checkpoint, Stored
from peftsurgery.disk.durable import discard, opened, put, rename, settle, write_json
from peftsurgery.disk.durable import replace as replace_file
from peftsurgery.disk.identity import identify
from peftsurgery.disk.marker import Mark, half_patched, mark, marked, unmark
from peftsurgery.disk.patching import check_claimed, check_patchable, fold_into
from peftsurgery.disk.shard import read_shard
from peftsurgery.disk.undo import Patched, Undo, blocks, check_undo, digest, read_undo, write_undo
from peftsurgery.errors import CheckpointError, SurgeryError
from peftsurgery.events import Event, Listener, ignore
from peftsurgery.fold import touches
from peftsurgery.tally import Tally, measured

PROVENANCE = "peftsurgery.json"
DOORS = (SINGLE, INDEX, "config.json")
"""The files that a loader opens first, in the order in which they come back."""


def patch(
    checkpoint: Checkpoint,
    adapters: Sequence[Adapter],
    undo_file: Path,
    provenance: Mapping[str, object],
    fingerprint: str,
    *,
    listen: Listener = ignore,
) -> dict[str, Tally]:
    """Fold `adapters` into the checkpoint's own files, and keep what they held in `undo_file`.

    What fails, Ctrl-C included, is undone at once; after a crash `recover` does it.

    Args:
        adapters: in the checkpoint's names, fitted to it.
        provenance: what `peftsurgery.json` will say, beside what undoing needs.
        fingerprint: what identifies the adapters, so that they are not folded in twice.

    Returns:
        The tensors that changed, and how far.

    Raises:
        CheckpointError: a file cannot be patched (nothing is touched), read or written.
        FoldError: folding gave a NaN; the checkpoint is as it was.
    """
    root, changes = checkpoint.path, touches(*adapters)
    held = _by_file([s for s in checkpoint.tensors.values() if s.name in changes])
    check_claimed(checkpoint, changes)
    check_patchable(root, held)
    _check_undo_place(root, undo_file)
    undo = write_undo(undo_file, root, held, _text(root / PROVENANCE))
    try:
        mark(root, Mark(str(undo_file), undo.identity))
        _hide(root)
        after, tallies = _fold(root, undo, changes, listen)
        said = {"undo": undo.identity, "adapters": fingerprint, "after": after}
        earlier = json.loads(undo.provenance) if undo.provenance else {}
        write_json(
            root / PROVENANCE, {**provenance, **measured(tallies), "in_place": [*_stack(earlier), said]}
        )
        _show(root)
        unmark(root)
    except BaseException:
        _undone(root, undo)
        raise
    return tallies


def recover(root: Path, undo_file: Path) -> bool:
    """Make a half patched model what it was before the merge; False where it is not half patched.

    Raises:
        CheckpointError: it needs another undo file, or cannot be read or written.
    """
    found = marked(root)
    if found is None:
        return False
    undo = read_undo(undo_file)
    if undo.identity != found.identity:
        raise half_patched(root, found.undo)
    check_undo(undo)
    _restore(root, undo, ignore)
    return True


def unpatch(root: Path, undo_file: Path, *, listen: Listener = ignore) -> tuple[str, ...]:
    """Put the original bytes back; the names of the tensors that were, none where they are there already.

    Raises:
        CheckpointError: the undo file is damaged or another model's, the model was changed since, or a file
            cannot be written.
    """
    undo = read_undo(undo_file)
    check_undo(undo)
    found = marked(root)
    if found is not None and found.identity != undo.identity:
        raise half_patched(root, found.undo)
    if found is None:
        if holds_originals(root, undo):
            return ()
        _check_last(root, undo)
        mark(root, Mark(str(undo_file), undo.identity))
    _restore(root, undo, listen)
    return tuple(undo.originals)


def holds_originals(root: Path, undo: Undo) -> bool:
    """Whether the model holds, byte for byte, what the undo file keeps of it."""
    return all(digest(_stored(root, one)) == one.before for one in undo.patched)


def merged_with(root: Path) -> dict[str, str]:
    """For every merge in place that the model has in it, what identifies its adapters → its undo file."""
    text = _text(root / PROVENANCE)
    return {str(one["adapters"]): str(one["undo"]) for one in _stack(json.loads(text) if text else {})}


def _fold(
    root: Path, undo: Undo, changes: Mapping[str, tuple[Change, ...]], listen: Listener
) -> tuple[dict[str, str], dict[str, Tally]]:
    """Patch every file; the SHA-256 of the new bytes of each, and how far every tensor moved."""
    count, total = itertools.count(1), len(undo.originals)

    def tell(stored: Stored) -> None:
        listen(Event("fold", stored.name, next(count), total, stored.nbytes))

    after: dict[str, Future[str]] = {}
    tallies: dict[str, Tally] = {}
    with ThreadPoolExecutor(1) as beside:  # a file is flushed while the next one is folded
        for one in undo.patched:
            held = _stored(root, one)
            tallies |= fold_into(_where(root, one.file), held, changes, tell)
            after[one.file] = beside.submit(_settled, _where(root, one.file), held)
        return {file: found.result() for file, found in after.items()}, tallies


def _settled(file: Path, held: Sequence[Stored]) -> str:
    """The SHA-256 of these tensors of a file, which are on the disk then."""
    settle(file)
    return digest(held)


def _restore(root: Path, undo: Undo, listen: Listener) -> None:
    """Write the original bytes back; it may be stopped and begun again at any point."""
    places = {one.file: _stored(root, one) for one in undo.patched}
    _hide(root)
    done, total = 0, len(undo.originals)
    for file, held in places.items():
        with opened(_where(root, file)) as descriptor:
            for stored in held:
                end = stored.start
                for block in blocks(undo.originals[stored.name]):
                    end = put(stored.file, descriptor, block, end)
                done += 1
                listen(Event("restore", stored.name, done, total, stored.nbytes))
    if undo.provenance is None:
        discard(root / PROVENANCE)
    else:
        replace_file(root / PROVENANCE, undo.provenance.encode())
    _show(root)
    unmark(root)


def _undone(root: Path, undo: Undo) -> None:
    """Take back a patch that failed, and its undo file; where that fails too, say how to go on."""
    try:
        _restore(root, undo, ignore)
        discard(undo.file)
    except SurgeryError as error:
        if marked(root) is None:
            return
        raise half_patched(root, undo.file) from error


def _hide(root: Path) -> None:
    for name in reversed(DOORS):
        if os.path.lexists(root / name):
            rename(root / name, _hidden(root, name))


def _show(root: Path) -> None:
    for name in DOORS:
        if os.path.lexists(_hidden(root, name)):
            rename(_hidden(root, name), root / name)


def _hidden(root: Path, name: str) -> Path:
    return root / f".{name}.patching"


def _where(root: Path, file: str) -> Path:
    """Where a file of the model lies now."""
    hidden = _hidden(root, file)
    return hidden if file in DOORS and hidden.exists() else root / file


def _stored(root: Path, one: Patched) -> list[Stored]:
    """The patched tensors of one file, where they lie now.

    Raises:
        CheckpointError: it is not the file that was patched.
    """
    place = _where(root, one.file)
    found = identify(place) if place.is_file() else None
    if found is None or (found.size, found.header_sha256) != (one.size, one.header):
        raise CheckpointError(
            f"{root / one.file} is not the file that the undo file was written for. Give the model that was "
            "merged in place with it; nothing was changed."
        )
    tensors = {stored.name: stored for stored in read_shard(place).tensors}
    return [tensors[name] for name in one.tensors]


def _by_file(tensors: Sequence[Stored]) -> dict[Path, list[Stored]]:
    held: dict[Path, list[Stored]] = defaultdict(list)
    for stored in tensors:
        held[stored.file].append(stored)
    return dict(held)


def _stack(said: object) -> list[dict[str, object]]:
    found = said.get("in_place", []) if isinstance(said, dict) else []
    return [one for one in found if isinstance(one, dict)]


def _text(file: Path) -> str | None:
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _check_last(root: Path, undo: Undo) -> None:
    """Refuse to undo what is not the last merge in place, or what was changed since."""
    text = _text(root / PROVENANCE)
    stack = _stack(json.loads(text) if text else {})
    identities = [one.get("undo") for one in stack]
    if undo.identity not in identities:
        raise CheckpointError(
            f"{root} was not merged in place with {undo.file}. Give the undo file of its last merge in place; "
            "nothing was changed."
        )
    if identities[-1] != undo.identity:
        raise CheckpointError(
            f"{root} was merged in place again after {undo.file} was written. Unmerge the later ones first, "
            "the last one first; nothing was changed."
        )
    after = stack[-1].get("after")
    now = {one.file: digest(_stored(root, one)) for one in undo.patched}
    if after != now:
        changed = next(file for file in now if not isinstance(after, dict) or after.get(file) != now[file])
        raise CheckpointError(
            f"{root / changed} was changed after the merge in place, so {undo.file} does not belong to what it "
            "holds. Download the model again; nothing was changed."
        )


def _check_undo_place(root: Path, undo_file: Path) -> None:
    if root.resolve() in undo_file.resolve().parents:
        raise CheckpointError(
            f"{undo_file} lies in the model's directory, where a loader could take it for weights. "
            "Name a place outside; nothing was changed."
        )
    if not undo_file.parent.is_dir():
        raise CheckpointError(f"{undo_file.parent} is not a directory. Make it first; nothing was changed.")
    if not os.path.lexists(undo_file):
        return
    unneeded = False
    with suppress(CheckpointError, KeyError):
        unneeded = holds_originals(root, read_undo(undo_file))
    if not unneeded:
        raise CheckpointError(
            f"{undo_file} exists, and is not the undo file of a merge that was undone. Name another file; "
            "nothing was changed."
        )


__all__ = ["holds_originals", "merged_with", "patch", "recover", "unpatch"]
