"""verify --bits: a merged checkpoint, tensor by tensor, against what its base and its adapters make."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peftsurgery.commands.adapter_files import Given
from peftsurgery.commands.fitting import fit
from peftsurgery.commands.provenance import recorded, vanished
from peftsurgery.commands.recorded import check_adapters, check_base
from peftsurgery.commands.report import Report
from peftsurgery.disk.checkpoint import open_checkpoint
from peftsurgery.disk.locate import locate
from peftsurgery.disk.recompute import Comparison, compare
from peftsurgery.errors import ParityError, PlanError, listing
from peftsurgery.events import Listener
from peftsurgery.tally import told


def verify_merged(
    merged: str | Path,
    base: str | Path,
    given: Sequence[Given],
    *,
    weighted: bool,
    task: str | None,
    sample: int | None,
    trust_remote_code: bool,
    listen: Listener,
) -> Report:
    """Make every tensor of a merged checkpoint again and compare bits; no model is loaded.

    What its `peftsurgery.json` says of base and adapters is compared first, and it gives what was not said.

    Args:
        weighted: whether the weights of the adapters were said.

    Raises:
        ParityError: another base, another adapter, or tensors that differ, are missing or too many; it names them.
        PlanError: `sample` is no positive number, or no adapter was given.
    """
    if sample is not None and sample < 1:
        raise PlanError(f"`--sample` is {sample}. Give the number of tensors to compare, e.g. `--sample 16`.")
    source, result = open_checkpoint(locate(base)), open_checkpoint(locate(merged))
    said = recorded(result.path)
    if said is not None:
        check_base(merged, source, said)
        given = check_adapters(merged, given, said, weighted=weighted)
        task = task or said["options"].get("task")
    if not given:
        raise PlanError(
            "`--bits` makes a merge again. Name the adapters that were merged: `--adapter ADAPTER`."
        )
    adapters = [one.scaled for one in given]
    plan = fit(source, adapters, task=task, untie=True, trust_remote_code=trust_remote_code)
    found = compare(
        source, result, plan.adapters, rename=plan.rename, twins=plan.twins, sample=sample, listen=listen
    )
    if found.wrong:
        raise _wrong(merged, found)
    return _report(merged, base, given, found, said is not None)


def _wrong(merged: str | Path, found: Comparison) -> ParityError:
    off = max((one.off for one in found.found), default=0.0)
    compared = len(found.found) + len(found.missing) + len(found.unexpected)
    return ParityError(
        f"{merged} is not this base with these adapters: {len(found.wrong)} of {compared} tensors differ, among them "
        f"{listing(found.wrong)} (largest absolute difference {off:.3g}; {len(found.missing)} missing, "
        f"{len(found.unexpected)} too many). Give the base, adapters and weights that its peftsurgery.json names, "
        "or merge again.",
        max_abs_diff=off,
        tolerance=0.0,
        output=found.wrong[0],
    )


def _report(
    merged: str | Path, base: str | Path, given: Sequence[Given], found: Comparison, identified: bool
) -> Report:
    touched = {one.name: one.tally for one in found.found if one.tally.numel}
    facts = {
        "model": str(merged),
        "against": str(base),
        "adapters": [one.adapter.name for one in given],
        "weights": [one.weight for one in given],
        "identified": identified,
        "compared": len(found.found),
        "touched": len(touched),
        "cast": found.cast,
        "vanished": vanished(touched),
        "tensors": told(touched),
    }
    return Report("verify", f"Every bit of {len(found.found)} tensors is as it should be.", facts)
