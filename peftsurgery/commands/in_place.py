"""merge --in-place and unmerge: patch a checkpoint where it lies, and take it back bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peftsurgery.adapter import fingerprint
from peftsurgery.commands.adapter_files import Given
from peftsurgery.commands.companions import config_changes
from peftsurgery.commands.fitting import Fit, fit
from peftsurgery.commands.provenance import inputs, provenance, vanished
from peftsurgery.commands.report import Report
from peftsurgery.disk import merge as disk_merge
from peftsurgery.disk.checkpoint import Checkpoint, open_checkpoint
from peftsurgery.disk.in_place import merged_with, patch, recover, unpatch
from peftsurgery.disk.locate import locate
from peftsurgery.disk.lock import locked
from peftsurgery.disk.undo import read_undo
from peftsurgery.errors import CheckpointError, PlanError, listing
from peftsurgery.events import Listener, ignore
from peftsurgery.fold import touches


def unmerge(model: str | Path, *, undo: str | Path, listen: Listener = ignore) -> Report:
    """Give a checkpoint that was merged in place the bytes that it had; a half patched one too.

    Args:
        model: the model directory.
        undo: the undo file of its last merge in place.

    Raises:
        CheckpointError: the undo file is damaged or another model's, or the model was changed since.
    """
    root = locate(model)
    with locked(root, f"patching {root}"):
        names = unpatch(root, Path(undo).expanduser(), listen=listen)
    headline = (
        f"Restored {len(names)} tensors." if names else "Nothing to undo: the original bytes are there."
    )
    return Report("unmerge", headline, {"model": str(model), "undo": str(undo), "restored": len(names)})


def merge_in_place(
    model: str | Path,
    given: Sequence[Given],
    undo: str | Path | None,
    task: str | None,
    full: bool,
    trust_remote_code: bool,
    listen: Listener,
) -> Report:
    """Fold adapters into a checkpoint's own files; see `merge`.

    Args:
        full: hash every byte of the inputs.
    """
    if undo is None or str(model).endswith(".onnx"):
        raise PlanError(
            "A merge in place changes a checkpoint directory and keeps the original bytes: "
            f"`peftsurgery merge {model} ADAPTER --in-place --undo FILE`. Nothing was changed."
        )
    adapters = [one.scaled for one in given]
    root, file, known = locate(model), Path(undo).expanduser(), fingerprint(*adapters)
    with locked(root, f"patching {root}"):
        recovered = recover(root, file)
        checkpoint = open_checkpoint(root)
        facts: dict[str, object] = {"model": str(model), "undo": str(undo), "recovered": recovered}
        if _is_merged(root, file, known):
            return Report("merge", "Nothing to do: the adapters are merged already.", facts)
        plan = fit(checkpoint, adapters, task=task, untie=False, trust_remote_code=trust_remote_code)
        _check_fits_in_place(checkpoint, plan)
        said = provenance(model, inputs(checkpoint, given), list(touches(*plan.adapters)), full=full)
        tallies = patch(checkpoint, plan.adapters, file, said, known, listen=listen)
    facts |= {"tensors": list(tallies), "vanished": vanished(tallies)}
    hint = f"peftsurgery unmerge {model} --undo {undo}"
    return Report("merge", f"Merged into {len(tallies)} tensors in place.", facts, hint=hint)


def _is_merged(root: Path, undo: Path, fingerprint: str) -> bool:
    merged = merged_with(root)
    if fingerprint not in merged:
        return False
    if undo.is_file() and read_undo(undo).identity == merged[fingerprint]:
        return True
    raise CheckpointError(
        f"{root} has these adapters in it already, merged in place with another undo file. "
        "Unmerge them with that one first; nothing was changed."
    )


def _check_fits_in_place(checkpoint: Checkpoint, plan: Fit) -> None:
    """Refuse what would change more than the values of tensors that are there."""
    planned = disk_merge.plan(
        checkpoint, plan.adapters, checkpoint.path, rename=plan.rename, twins=plan.twins
    )
    renamed = [name for name in checkpoint.tensors if plan.rename(name) != name]
    changed = config_changes(checkpoint.path, plan.blueprint.architecture, plan.blueprint.classes)
    for names, fact in (
        (planned.added, "adds tensors to the model"),
        (renamed, "renames the model's tensors"),
        (changed, "changes the model's configuration"),
    ):
        if names:
            raise PlanError(
                f"The merge {fact} ({listing(names)}), which cannot be done in place. "
                "Merge into a new directory with `-o OUT`; nothing was changed."
            )
