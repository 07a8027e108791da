"""export-onnx --check-placement: would every node that computes run on the GPU?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peftsurgery.commands.report import Report
from peftsurgery.errors import PlacementError

if TYPE_CHECKING:
    import onnx_ir as ir

    from peftsurgery.graph.placement import Placement

CUDA = "cuda"


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
