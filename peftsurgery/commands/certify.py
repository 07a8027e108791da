"""The certificate of an export: what went in, what came out, how it was compared, and what was not."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peftsurgery import __version__
from peftsurgery.adapter import fingerprint
from peftsurgery.commands.exporting import Order
from peftsurgery.commands.operating import has_tokens
from peftsurgery.commands.provenance import adapter_words
from peftsurgery.disk.checkpoint import open_checkpoint
from peftsurgery.disk.identity import file_sha256, known
from peftsurgery.disk.locate import locate
from peftsurgery.errors import CheckpointError
from peftsurgery.live.precision import coarsest

if TYPE_CHECKING:
    from torch import nn

    from peftsurgery.graph.parity import Parity

SAFETENSORS = ".safetensors"


def certificate(
    order: Order,
    live: nn.Module,
    parity: Parity | None,
    graphs: Mapping[str, Path],
    weights: Mapping[str, Path],
    *,
    opset: int,
    apart: bool = False,
) -> dict[str, Any]:
    """What `peftsurgery.json` says of an export; its essentials are noted in the graphs too.

    Args:
        live: the model that was exported.
        graphs, weights: the files that were written, by the names that they have in the output.
        opset: that of the graphs.
        apart: whether its soft prompts are in a file of their own.
    """
    base = _base(order)
    _note(graphs.values(), order, base, parity, apart)
    return {
        "peftsurgery": __version__,
        "verb": "export-onnx",
        "architecture": type(live).__name__,
        "base": base,
        "adapters": [adapter_words(one, fingerprint(one.adapter), full=order.hash) for one in order.given],
        "form": order.form,
        "dtype": str(coarsest(live)).removeprefix("torch."),
        "opset": opset,
        "for": order.target,
        "portable": order.portable,
        "graphs": {name: {"sha256": file_sha256(file)} for name, file in graphs.items()},
        "weights": {name: _identity(file, order.hash) for name, file in weights.items()},
        "versions": _versions(),
        "parity": None if parity is None else parity.to_dict(),
        "not_verified": _unverified(order, parity, base),
    }


def _base(order: Order) -> dict[str, Any]:
    """The model's name, and the files of a directory: weights by size and header, or by every byte."""
    if not isinstance(order.model, str | Path):
        return {"name": type(order.model).__name__, "files": {}}
    path = locate(order.model)
    small = {"config.json": {"sha256": file_sha256(path / "config.json")}}
    shards = open_checkpoint(path).shards
    large = {s.file.relative_to(path).as_posix(): _identity(s.file, order.hash) for s in shards}
    return {"name": Path(order.model).name, "files": {**small, **large}}


def _identity(file: Path, full: bool) -> dict[str, Any]:
    if file.suffix == SAFETENSORS:
        return known(file, full=full).to_dict()
    whole = {"sha256": file_sha256(file)} if full else {}
    return {"size": file.stat().st_size, **whole}


def _versions() -> dict[str, str]:
    import onnx
    import onnxruntime
    import transformers

    libraries = (torch, transformers, onnx, onnxruntime)
    return {library.__name__: library.__version__ for library in libraries}


def _unverified(order: Order, parity: Parity | None, base: Mapping[str, Any]) -> list[str]:
    """What the certificate does not vouch for, and why."""
    said = [] if base["files"] else [f"{base['name']}: a live model has no file"]
    if parity is None:
        said.append("outputs: the comparison was left out")
    else:
        said.append(f"outputs elsewhere than on {parity.provider}, on padding, and of other lengths")
    if not order.hash:
        said.append("values of weights: their files are known by size, header and samples, not by every byte")
    return said


def _note(
    graphs: Iterable[Path], order: Order, base: Mapping[str, Any], parity: Parity | None, apart: bool
) -> None:
    """Write the essentials into the graphs' own metadata.

    A graph whose soft prompts lie `apart` is that of its base, the same for all of them, so it says nothing of one.
    """
    from peftsurgery.graph import weights

    inside = [adapter for adapter in order.adapters if not (apart and has_tokens(adapter))]
    said = {
        "version": __version__,
        "base": base["name"],
        "base_sha256": sha256(json.dumps(base["files"]).encode()).hexdigest(),
        "adapters": ",".join(adapter.name for adapter in inside),
        "form": replace(order, adapters=inside).form,
        **({} if parity is None else {"tolerance": f"{parity.accepted.absolute:g}"}),
    }
    for graph in graphs:
        weights.note(graph, {word: str(value) for word, value in said.items()})


def made_before(file: Path) -> Any:
    """What a `peftsurgery.json` says of how a checkpoint was made, where an export's will take its place.

    Raises:
        CheckpointError: it is no JSON.
    """
    if not file.is_file():
        return None
    try:
        said = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file} is no JSON ({error}). Move it away; nothing was written.") from error
    return said.get("model") if said.get("verb") == "export-onnx" else said
