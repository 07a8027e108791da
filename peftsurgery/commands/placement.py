"""export-onnx --for, --check-placement: graphs for a device, and would every node that computes run on it?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peftsurgery.commands.report import Report
from peftsurgery.errors import PlacementError, PlanError

if TYPE_CHECKING:
    import onnx_ir as ir

    from peftsurgery.graph.placement import Placement

CPU, CUDA = "cpu", "cuda"
OLDER = 20
"""What most runtimes run."""


def opset_of(target: str, opset: int | None, *, portable: bool) -> int:
    """The opset of a graph for a device.

    Raises:
        PlanError: there is no such device, or the opset lacks its operators.
    """
    if target not in (CPU, CUDA):
        raise PlanError(f"target is {target!r} and is {CPU!r} or {CUDA!r}. Nothing was written.")
    from peftsurgery.graph.export import OPSET

    if opset is not None and target == CUDA and opset < OPSET:
        raise PlanError(
            f"Opset {opset} lacks the Attention that CUDA runs. Leave out `--opset`, or name {OPSET}; nothing "
            "was written."
        )
    if opset is not None:
        return opset
    return OLDER if portable and target != CUDA else OPSET


def fused(graphs: Mapping[str, ir.Model]) -> dict[str, Any]:
    """What a report says of the operators that stand for many."""
    from peftsurgery.graph.fusions import counts

    found = {name: counts(graph) for name, graph in graphs.items()}
    total: Counter[str] = sum((Counter(one) for one in found.values()), Counter())
    return {"fused": ", ".join(f"{count} {op}" for op, count in total.items()), "operators": found}


def placement(graphs: Mapping[str, ir.Model]) -> dict[str, Any]:
    """What a report says of where the nodes of a model's graphs run.

    Raises:
        PlacementError: a node that computes has no CUDA kernel; it has the report with every such node.
    """
    from peftsurgery.graph.placement import placed

    found = {name: placed(graph) for name, graph in graphs.items()}
    said = [str(one) if len(found) == 1 else f"{name}: {one}" for name, one in found.items()]
    facts = {"placement": "; ".join(said), "placed": {name: one.to_dict() for name, one in found.items()}}
    lost = [node for one in found.values() for node in one.lost]
    if lost:
        report = Report("export-onnx", "Not every node would run on CUDA.", facts, _table(found))
        raise PlacementError(
            f"{len(lost)} nodes that compute have no CUDA kernel, {lost[0].op} first ({lost[0].types}). Export "
            "in another dtype or opset, or leave `--check-placement` out; nothing was written.",
            report=report,
        )
    return facts


def _table(found: Mapping[str, Placement]) -> list[tuple[str, ...]]:
    rows = [(name, node.op, node.types, node.name) for name, one in found.items() for node in one.lost]
    return [("graph", "operation", "types", "node"), *rows]
