"""export-onnx, weights copied: into a file beside the graph, or into the graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from peftsurgery.commands.certify import certificate
from peftsurgery.commands.changed_weights import changed
from peftsurgery.commands.exporting import (
    Order,
    Traced,
    companions,
    compared,
    report,
    traced,
    write_prefix,
)
from peftsurgery.commands.operating import operated
from peftsurgery.commands.prefixed import KEPT
from peftsurgery.commands.provenance import PROVENANCE
from peftsurgery.commands.report import Report
from peftsurgery.commands.stored_weights import base_of
from peftsurgery.disk.durable import staged, write_json
from peftsurgery.errors import NotReferable
from peftsurgery.events import Event, Listener

if TYPE_CHECKING:
    from torch import nn

    from peftsurgery.graph.reference import Held

INLINE = "inline"
Away = Mapping[str, "Held"]
"""What gives the weights of a model that was made without them."""


def export_copied(order: Order, why: str, listen: Listener) -> Report:
    """Export a model with its weights, and verify it.

    A directory's weights are read one at a time, each when it is written, where that can be.

    Args:
        why: the reason for copying, where it was not asked for.

    Raises:
        ExportError: the weights are too large for the graph.
        UnsupportedModel, ParityError: as `export_onnx` does.
    """
    with staged(order.out) as directory, _opened(order) as (model, away):
        listen(Event("export", "tracing", 0, 3))
        made = traced(model, order, away)
        listen(Event("export", "writing", 1, 3))
        files = _write(order, model, made, directory)
        graphs = {name: directory / name for name in made.graphs}
        parity = compared(order, made, [*graphs.values()], listen, model if away is None else None)
        data = {file.name: file for file in files if file.name not in graphs}
        write_json(
            directory / PROVENANCE,
            certificate(order, model, parity, graphs, data, opset=made.opset, apart=bool(made.apart)),
        )
        nbytes = sum(file.stat().st_size for file in files)
        listen(Event("export", "done", 3, 3))
        return report(model, order, nbytes, made, parity, {"weights": _said(order, why)})


@contextmanager
def _opened(order: Order) -> Iterator[tuple[nn.Module, Away | None]]:
    """The model to trace, and what gives its weights where it has none."""
    try:
        base = changed(base_of(order, order.model), order.merged)
    except NotReferable:
        with operated(order.model, *order.worn) as model:
            yield model, None
        return
    with operated(base.model, *order.kept) as model:
        yield model, base.readers()


def _write(order: Order, model: nn.Module, made: Traced, directory: Path) -> list[Path]:
    from peftsurgery.graph import weights

    inline = order.weights == INLINE
    files = [
        file
        for name, graph in made.graphs.items()
        for file in weights.save(graph, directory, name, inline=inline)
    ]
    write_prefix(made, directory / KEPT)
    companions(order, model, directory)
    return files


def _said(order: Order, why: str) -> str:
    if order.weights == INLINE:
        return "in the graph"
    return f"copied: {why}" if why else "copied"
