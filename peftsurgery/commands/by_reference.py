"""export-onnx, weights by reference: they stay in the checkpoint's files, and the graph points there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftsurgery.commands.exporting import (
    Order,
    Traced,
    certificate,
    companions,
    report,
    traced,
    verified,
    write_prefix,
)
from peftsurgery.commands.operating import operated
from peftsurgery.commands.prefixed import KEPT
from peftsurgery.commands.report import Report, size
from peftsurgery.commands.stored_weights import Base, base_of
from peftsurgery.disk.durable import added, lend, staged, write_json
from peftsurgery.errors import CheckpointError, NotReferable, listing
from peftsurgery.events import Event, Listener

if TYPE_CHECKING:
    import onnx_ir as ir

    from peftsurgery.graph.parity import Parity

CERTIFICATE = "peftsurgery.json"
BELOW = Path("weights")
"""Where the checkpoint's files lie below a graph that is written elsewhere: what holds a graph is no checkpoint too."""
Graphs = Mapping[str, "ir.Model"]
"""The graphs of one model, by the names of their files."""


def export_by_reference(order: Order, listen: Listener) -> Report:
    """Export a model without reading its weights, and verify it with them.

    Raises:
        NotReferable: it is a live model, an adapter would have to be merged, or weights are not stored as the
            model computes with them.
        CheckpointError: the files are not what the model needs, or `out` cannot be written.
        UnsupportedModel, ParityError: as `export_onnx` does.
    """
    _check(order)
    listen(Event("export", "tracing", 0, 3))
    base = base_of(order, order.model)
    beside = order.out.expanduser().resolve() == base.checkpoint.path.resolve()
    with operated(base.model, *order.worn) as live:
        made = traced(live, order, base.spans(Path() if beside else BELOW))
    if beside:
        _check_own(base, made.graphs)
    listen(Event("export", "writing", 1, 3))
    write = _beside if beside else _apart
    done = write(order, base, made, listen)
    listen(Event("export", "done", 3, 3))
    return done


def _check(order: Order) -> None:
    if order.merged:
        raise NotReferable(f"{listing(order.merged)} is merged, and the merged weights lie in no file yet")


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


def _apart(order: Order, base: Base, made: Traced, listen: Listener) -> Report:
    """Into a directory of its own, which gets the checkpoint's files as cheaply as its file system can."""
    from peftsurgery.graph import reference, weights

    source = base.checkpoint.path
    with staged(order.out) as directory:
        lent = {
            name: lend(source / Path(name).relative_to(BELOW), directory / name)
            for name in _files(made.graphs)
        }
        for name, graph in made.graphs.items():
            reference.move(graph, directory)
            weights.save(graph, directory, name)
        write_prefix(made, directory / KEPT)
        companions(order, base.model, directory)
        parity = _compared(order, made, [directory / name for name in made.graphs], listen)
        write_json(directory / CERTIFICATE, certificate(base.model, order, parity))
        copied = sum((directory / name).stat().st_size for name, (way, _) in lent.items() if way == "copy")
        written = sum((directory / name).stat().st_size for name in made.graphs) + copied
        more = _facts(made.graphs, {name: way for name, (way, _) in lent.items()}, _said(lent))
        return report(base.model, order, written, made.signature, parity, more)


def _beside(order: Order, base: Base, made: Traced, listen: Listener) -> Report:
    """Beside the checkpoint's own files, none of which is touched."""
    from peftsurgery.graph import reference, weights

    path = base.checkpoint.path
    names, apart = [*made.graphs], [KEPT] if made.apart else []
    with added(path, *names, *apart, CERTIFICATE) as (*rest, said):
        files = rest[: len(names)]
        for prefix in rest[len(names) :]:
            write_prefix(made, prefix)
        for file, graph in zip(files, made.graphs.values(), strict=True):
            reference.move(graph, path)
            weights.save(graph, path, file.name)
        parity = _compared(order, made, files, listen)
        before = _made(path / CERTIFICATE)
        write_json(said, {**certificate(base.model, order, parity), **({"model": before} if before else {})})
        more = _facts(
            made.graphs, dict.fromkeys(_files(made.graphs), "own"), "the checkpoint's own, untouched"
        )
        return report(base.model, order, sum(f.stat().st_size for f in files), made.signature, parity, more)


def _made(file: Path) -> Any:
    """What a `peftsurgery.json` says of how the checkpoint was made, for it stands where ours will."""
    if not file.is_file():
        return None
    said = json.loads(file.read_text())
    return said.get("model") if said.get("verb") == "export-onnx" else said


def _compared(order: Order, made: Traced, graphs: Sequence[Path], listen: Listener) -> Parity | None:
    listen(Event("export", "verifying", 2, 3))
    if not order.verify:
        return None
    with operated(order.model, *order.worn) as live:
        return verified(live, order, made, graphs)


def _files(graphs: Graphs) -> list[str]:
    """The checkpoint's files that the graphs read."""
    from peftsurgery.graph import reference

    return sorted({file for graph in graphs.values() for file in reference.files(graph)})


def _facts(graphs: Graphs, ways: dict[str, str], said: str) -> dict[str, Any]:
    from peftsurgery.graph import reference

    return {
        "referenced": size(sum(reference.nbytes(graph) for graph in graphs.values())),
        "weights": f"by reference: {said}",
        "files": dict(ways),
    }


def _said(lent: dict[str, tuple[str, str]]) -> str:
    """How the checkpoint's files came beside the graph, in words for a person."""
    ways = {way for way, _ in lent.values()}
    words = []
    if "copy" in ways:
        words.append(f"copied, for {', '.join(sorted({why for way, why in lent.values() if way == 'copy'}))}")
    if "hard link" in ways:
        words.append("hard links, which ONNX Runtime reads and onnx's own checker and loader refuse")
    if "reflink" in ways:
        words.append("reflinks, files of their own that share their blocks with the checkpoint's")
    return "; ".join(words)
