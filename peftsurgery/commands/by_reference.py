"""export-onnx, weights by reference: they stay in the checkpoint's files, and the graph points there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftsurgery.commands.assembled_weights import Part
from peftsurgery.commands.certify import certificate, made_before
from peftsurgery.commands.changed_weights import changed, written
from peftsurgery.commands.exporting import (
    Order,
    Traced,
    companions,
    compared,
    report,
    traced,
    write_prefix,
)
from peftsurgery.commands.lending import COPY, OWN, WRITTEN, Way, lent, told
from peftsurgery.commands.operating import operated
from peftsurgery.commands.prefixed import KEPT
from peftsurgery.commands.provenance import PROVENANCE
from peftsurgery.commands.report import Report, size
from peftsurgery.commands.stored_weights import Base, base_of
from peftsurgery.commands.worn_weights import worn
from peftsurgery.disk.durable import added, staged, write_json
from peftsurgery.errors import CheckpointError, NotReferable, listing
from peftsurgery.events import Event, Listener

if TYPE_CHECKING:
    import onnx_ir as ir


BELOW = Path("weights")
"""Where the weights lie below a graph that is written elsewhere: what holds a graph is no checkpoint too."""
CHANGED = BELOW / "changed.safetensors"
"""The file of the weights that lie in no file of the checkpoint as the model computes with them."""
Graphs = Mapping[str, "ir.Model"]
"""The graphs of one model, by the names of their files."""


def export_by_reference(order: Order, listen: Listener) -> Report:
    """Export a model without reading its weights, and verify it with them.

    What adapters change is written once, to a file of its own, and all else stays in the checkpoint's.

    Raises:
        NotReferable: it is a live model, or weights are not stored as the model computes with them.
        CheckpointError: the files are not what the model needs, or `out` cannot be written.
        FoldError, TiedSites: an adapter cannot be merged.
        UnsupportedModel, ParityError: as `export_onnx` does.
    """
    stored = base_of(order, order.model)
    _check_mostly_stored(stored)
    base = changed(stored, order.merged)
    beside = order.out.expanduser().resolve() == base.checkpoint.path.resolve()
    done = (_beside if beside else _apart)(order, base, listen)
    listen(Event("export", "done", 3, 3))
    return done


def _check_mostly_stored(base: Base) -> None:
    """Refuse to write most of a checkpoint again and to call that a reference."""
    made = {*base.made.values()}
    if sum(one.nbytes for one in made) <= sum(stored.nbytes for stored in {*base.held.values()}):
        return
    largest = max(made, key=lambda one: one.nbytes)
    if isinstance(largest, Part):
        raise NotReferable(
            "Most weights are not in the checkpoint as such: transformers assembles them on loading"
        )
    words = f"Most weights are stored in {largest.source}, and the model computes in {largest.dtype}"
    raise NotReferable(words.replace("torch.", ""))


def _apart(order: Order, base: Base, listen: Listener) -> Report:
    """Into a directory of its own, which gets the checkpoint's files as cheaply as its file system can."""
    with staged(order.out) as directory:
        base = written(base, directory / CHANGED, listen)
        made, sources = _traced(order, base, BELOW, listen)
        ways = lent({name: sources[name] for name in _files(made.graphs)}, directory)
        files = _save(made.graphs, directory, [directory / name for name in made.graphs])
        write_prefix(made, directory / KEPT)
        companions(order, base.model, directory)
        parity = compared(order, made, files, listen)
        own = {name: directory / name for name, way in ways.items() if way.how == WRITTEN}
        graphs = dict(zip(made.graphs, files, strict=True))
        write_json(
            directory / PROVENANCE,
            certificate(order, base.model, parity, graphs, own, opset=made.opset, apart=bool(made.apart)),
        )
        new = [*files, *(directory / name for name, way in ways.items() if way.how in (COPY, WRITTEN))]
        more = _facts(made.graphs, ways)
        return report(base.model, order, sum(f.stat().st_size for f in new), made, parity, more)


def _beside(order: Order, base: Base, listen: Listener) -> Report:
    """Beside the checkpoint's own files, none of which is touched."""
    _check_unchanged(base)
    path, (made, _) = base.checkpoint.path, _traced(order, base, Path(), listen)
    _check_own(base, made.graphs)
    names, apart = [*made.graphs], [KEPT] if made.apart else []
    with added(path, *names, *apart, PROVENANCE) as (*rest, said):
        files = _save(made.graphs, path, rest[: len(names)])
        for prefix in rest[len(names) :]:
            write_prefix(made, prefix)
        parity = compared(order, made, files, listen)
        graphs = dict(zip(made.graphs, files, strict=True))
        before = made_before(path / PROVENANCE)
        made_of = {"model": before} if before else {}
        vouched = certificate(order, base.model, parity, graphs, {}, opset=made.opset, apart=bool(made.apart))
        write_json(said, {**vouched, **made_of})
        more = _facts(made.graphs, dict.fromkeys(_files(made.graphs), Way(OWN)))
        return report(base.model, order, sum(f.stat().st_size for f in files), made, parity, more)


def _traced(order: Order, base: Base, below: Path, listen: Listener) -> tuple[Traced, dict[str, Path]]:
    """The graphs, and the files that they may read by what they call them."""
    listen(Event("export", "tracing", 0, 3))
    with operated(base.model, *order.kept) as live:
        whole = worn(base, live, order.wearable) if below.parts else base
        made = traced(live, order, whole.spans(below))
    listen(Event("export", "writing", 1, 3))
    return made, whole.files(below)


def _save(graphs: Graphs, directory: Path, files: Sequence[Path]) -> Sequence[Path]:
    """Write the graphs, whose weights lie in `directory`, to these files of it."""
    from peftsurgery.graph import reference, weights

    for file, graph in zip(files, graphs.values(), strict=True):
        reference.move(graph, directory)
        weights.save(graph, directory, file.name)
    return files


def _check_unchanged(base: Base) -> None:
    if base.made:
        raise CheckpointError(
            f"{listing([*base.made])} has to be written, and a file of such weights beside {base.checkpoint.path}'s "
            "own would be taken for the model's by what reads every file there. Name another `-o`; nothing was written."
        )


def _check_own(base: Base, graphs: Graphs) -> None:
    path = base.checkpoint.path
    there = [name for name in graphs if (path / name).exists()]
    if there:
        raise CheckpointError(
            f"{path} holds {listing(there)} already. Move it away, or name another `-o`; nothing was written."
        )
    links = [shard.file.name for shard in base.checkpoint.shards if shard.file.is_symlink()]
    if links:
        raise CheckpointError(
            f"{listing(links)} in {path} is a symbolic link, as in a cache, and ONNX Runtime follows none that "
            "leaves the graph's directory. Name another `-o`; nothing was written."
        )


def _files(graphs: Graphs) -> list[str]:
    """The files that the graphs read."""
    from peftsurgery.graph import reference

    return sorted({file for graph in graphs.values() for file in reference.files(graph)})


def _facts(graphs: Graphs, ways: Mapping[str, Way]) -> dict[str, Any]:
    from peftsurgery.graph import reference

    return {
        "referenced": size(sum(reference.nbytes(graph) for graph in graphs.values())),
        "weights": f"by reference: {told(ways)}",
        "files": {name: way.how for name, way in ways.items()},
    }
