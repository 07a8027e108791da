"""What a comparison of two models found, and the report or the error that says it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

from peftsurgery.commands.exporting import parity_table
from peftsurgery.commands.report import Report, columns
from peftsurgery.commands.sides import Side
from peftsurgery.errors import ParityError

if TYPE_CHECKING:
    from peftsurgery.graph.greedy import Agreement
    from peftsurgery.graph.parity import Parity
    from peftsurgery.graph.parting import Layer


class Found(NamedTuple):
    """What a comparison found: of the outputs, of written text, on how many texts, and of the layers."""

    parity: Parity
    wrote: Agreement | None
    texts: int
    layers: Sequence[Layer] | None


def judged(left: Side, right: Side, whole: Found) -> Report:
    """The report, or the error that has it."""
    from peftsurgery.graph import parity

    found, wrote = whole.parity, whole.wrote
    facts = {
        "model": left.name,
        "against": right.name,
        "provider": found.provider,
        **({"remark": found.remark} if found.remark else {}),
        "dtypes": [str(side.dtype).removeprefix("torch.") for side in (left, right)],
        "tolerance": found.tolerance,
        "texts": whole.texts,
        "kl": found.kl,
        "greedy": None if wrote is None else str(wrote),
        "written": None if wrote is None else asdict(wrote),
        "parity": found.to_dict(),
        **_parted(whole),
    }
    body = "" if whole.layers is None else "\n".join([*columns(_layer_table(whole.layers)), ""])
    try:
        parity.check(found)
    except ParityError as error:
        error.report = Report("verify", f"They differ: {found}.", facts, parity_table(found), body)
        raise
    return Report("verify", f"They agree: {found}.", facts, parity_table(found), body)


def _parted(whole: Found) -> dict[str, Any]:
    """The facts about layers, where they were compared."""
    if whole.layers is None:
        return {}
    parts = next((layer.name for layer in whole.layers if layer.parts), None)
    if parts is None and not whole.parity.worst.max_abs_diff <= whole.parity.tolerance:
        parts = f"behind {whole.layers[-1].name}"
    return {"parts_first": parts or "nowhere", "layers": [asdict(layer) for layer in whole.layers]}


def _layer_table(found: Sequence[Layer]) -> list[tuple[str, ...]]:
    rows = [(layer.name, f"{layer.max_abs_diff:.1e}", f"{layer.mean_abs_diff:.1e}") for layer in found]
    return [("layer", "max |difference|", "mean"), *rows]
