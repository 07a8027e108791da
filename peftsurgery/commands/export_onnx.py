"""export-onnx: a model, its adapters merged or factored, as a graph that was compared with torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from peftsurgery.adapter import check
from peftsurgery.commands.adapter_files import Adapters, gather
from peftsurgery.commands.by_reference import export_by_reference
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
from peftsurgery.commands.prefixed import BAKED, FILE, KEPT
from peftsurgery.commands.report import Report
from peftsurgery.disk.durable import staged, write_json
from peftsurgery.errors import PlanError
from peftsurgery.events import Event, Listener, ignore
from peftsurgery.reading import AS_PEFT, Reading

if TYPE_CHECKING:
    from torch import nn

COPY, REFERENCE = "copy", "reference"


class _Weights(NamedTuple):
    """Where copied weights go: into a file beside the graph, and which export's they may share."""

    external: bool
    shared: str | Path | None


def export_onnx(
    model: nn.Module | str | Path,
    *,
    out: str | Path,
    adapters: Adapters = (),
    factored: bool = False,
    weight: Sequence[float] = (),
    task: str | None = None,
    opset: int = 20,
    verify: bool = True,
    tolerance: float | None = None,
    reading: Reading = AS_PEFT,
    external_weights: bool = False,
    share_weights: str | Path | None = None,
    weights: str = COPY,
    prefix: str = BAKED,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    listen: Listener = ignore,
) -> Report:
    """Export a model of text or images to ONNX, dynamic in batch and length, and verify it in ONNX Runtime.

    `out` receives `model.onnx` (and `model.onnx_data` past 2 GB), or, of an encoder-decoder, `encoder_model.onnx` and
    `decoder_model.onnx`, which are meant wherever `model.onnx` is named; `config.json`, the tokenizer and
    `peftsurgery.json`, the certificate of the comparison. Every initializer keeps its parameter's name.
    By reference, `out` may also be the model's own directory, which receives `model.onnx` and `peftsurgery.json`.

    Args:
        model: a live module (with or without adapters on it), or a model directory.
        adapters: merged into the weights first, or, with `factored`, kept as factors in the graph.
        weight: a factor for each adapter's effect.
        task: the task; by default the adapter's, or what the checkpoint was saved for.
        verify: compare with torch on several batches and lengths, padded ones too.
        tolerance: the largest absolute difference allowed; by default the dtype's.
        reading: how the graph reads virtual tokens, where it is not as in PEFT.
        external_weights: keep the weights in `model.onnx_data`, whatever their size.
        share_weights: the directory of another export with external weights: those that are the same are linked
            and not written again, so that many prompts or heads share one file of their base.
        weights: `copy` writes the weights with the graph; `reference` lets the graph read them where they are,
            in the checkpoint's safetensors files, which are never loaded for it (for verifying they are).
        prefix: what becomes of a decoder's soft prompt: `baked` into the graph, whose inputs speak of the caller's
            own tokens alone, or a `file`, `prefix.safetensors`, that a session feeds to the graph of the base.

    Raises:
        UnsupportedModel: no export for this architecture or task.
        ParityError: ONNX Runtime does not agree with torch; nothing is left at `out`.
        AdapterError, FoldError, CheckpointError, PlanError.
    """
    given = [check(a) for a in gather(adapters, weight, allow_pickle=allow_pickle)] if adapters else []
    order = Order(
        model, given, Path(out), factored, task, opset, verify, tolerance, reading, trust_remote_code, prefix
    )
    _check_prefix(prefix)
    kept = _Weights(external_weights, share_weights)
    if _by_reference(weights, kept):
        return export_by_reference(order, listen)
    return _export_copy(order, kept, listen)


def _by_reference(weights: str, kept: _Weights) -> bool:
    if weights not in (COPY, REFERENCE):
        raise PlanError(f"weights is {weights!r} and is {COPY!r} or {REFERENCE!r}. Nothing was written.")
    if weights == REFERENCE and (kept.external or kept.shared is not None):
        raise PlanError(
            "By reference the weights stay in the checkpoint's files, so there is nothing to keep apart or to share. "
            "Leave out `--external-weights` and `--share-weights`; nothing was written."
        )
    return weights == REFERENCE


def _check_prefix(prefix: str) -> None:
    if prefix not in (BAKED, FILE):
        raise PlanError(f"prefix is {prefix!r} and is {BAKED!r} or {FILE!r}. Nothing was written.")


def _export_copy(order: Order, kept: _Weights, listen: Listener) -> Report:
    with staged(order.out) as directory, operated(order.model, *order.worn) as live:
        made = _write_graphs(order, live, directory, kept, listen)
        listen(Event("export", "verifying", 2, 3))
        files = [directory / name for name in made.graphs]
        parity = verified(live, order, made, files) if order.verify else None
        write_json(directory / "peftsurgery.json", certificate(live, order, parity))
        nbytes = sum(file.stat().st_size for file in directory.glob("*.onnx*"))
        listen(Event("export", "done", 3, 3))
        return report(live, order, nbytes, made.signature, parity)


def _write_graphs(order: Order, live: nn.Module, directory: Path, kept: _Weights, listen: Listener) -> Traced:
    from peftsurgery.graph import weights

    listen(Event("export", "tracing", 0, 3))
    done = traced(live, order)
    listen(Event("export", "writing", 1, 3))
    for name, graph in done.graphs.items():
        if kept.shared is not None:
            weights.share(graph, Path(kept.shared) / name, directory)
        weights.save(graph, directory, name, inline=0 if kept.external else weights.INLINE)
    write_prefix(done, directory / KEPT)
    companions(order, live, directory)
    return done
