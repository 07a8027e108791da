"""export-onnx: a model, its adapters merged or factored, as a graph that was compared with torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from peftsurgery.commands.adapter_files import Adapters, given
from peftsurgery.commands.by_reference import export_by_reference
from peftsurgery.commands.copied import INLINE, export_copied
from peftsurgery.commands.exporting import Order
from peftsurgery.commands.placement import CPU, CUDA, opset_of
from peftsurgery.commands.prefixed import BAKED, FILE
from peftsurgery.commands.report import Report
from peftsurgery.dtypes import dtype_named
from peftsurgery.errors import NotReferable, PlanError
from peftsurgery.events import Listener, ignore
from peftsurgery.reading import AS_PEFT, Reading

if TYPE_CHECKING:
    from torch import nn

COPY, REFERENCE = "copy", "reference"


def export_onnx(
    model: nn.Module | str | Path,
    *,
    out: str | Path,
    adapters: Adapters = (),
    factored: bool = False,
    weight: Sequence[float] = (),
    task: str | None = None,
    opset: int | None = None,
    verify: bool = True,
    tolerance: float | None = None,
    reading: Reading = AS_PEFT,
    weights: str | None = None,
    prefix: str = BAKED,
    dtype: str | None = None,
    portable: bool = False,
    check_placement: str | None = None,
    target: str = CPU,
    hash: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    listen: Listener = ignore,
) -> Report:
    """Export a model of text or images to ONNX, dynamic in batch and length, and verify it in ONNX Runtime.

    `out` receives `model.onnx`, or, of an encoder-decoder, `encoder_model.onnx` and `decoder_model.onnx`, which are
    meant wherever `model.onnx` is named; the files of its weights, `config.json`, the tokenizer and
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
        weights: `reference` lets the graph read the weights where they are, in the checkpoint's safetensors files,
            which are never loaded for it (for verifying they are); `copy` writes them to `model.onnx.data`; `inline`
            into the graph. By default by reference, and copied where that cannot be; the report says why.
        prefix: what becomes of a decoder's soft prompt: `baked` into the graph, whose inputs speak of the caller's
            own tokens alone, or a `file`, `prefix.safetensors`, that a session feeds to the graph of the base.
        dtype: `float32`, `float16` or `bfloat16`, of weights, keys, values and logits; the model's own by default.
        portable: use operators of ONNX alone, and none of ONNX Runtime's own.
        opset: of the ONNX operators; by default 24, or 20 of `portable`.
        target: what the graph is for: `cpu`, or `cuda`, with larger operators in the place of many.
        check_placement: `cuda` looks up, without a GPU, whether every node that computes has a kernel there.
        hash: let the certificate know weight files by the SHA-256 of every byte, not only by size, header, samples.

    Raises:
        UnsupportedModel: no export for this architecture or task.
        NotReferable: `weights` is `reference`, and they lie in no file as the model computes with them.
        ParityError: ONNX Runtime does not agree with torch; nothing is left at `out`.
        PlacementError: a node that computes would run on the CPU; nothing was written.
        AdapterError, FoldError, CheckpointError, PlanError.
    """
    taken = given(adapters, weight, allow_pickle=allow_pickle) if adapters else []
    scaled = [one.scaled for one in taken]
    said = (
        factored,
        task,
        opset_of(target, opset, portable=portable),
        verify,
        tolerance,
        reading,
        trust_remote_code,
        prefix,
        weights,
    )
    known = check_placement, target, hash, tuple(taken)
    order = Order(model, scaled, Path(out), *said, dtype_named(dtype), portable, *known)
    _check_words(order)
    return _export(order, listen)


def _check_words(order: Order) -> None:
    if order.weights not in (None, REFERENCE, COPY, INLINE):
        raise PlanError(
            f"weights is {order.weights!r} and is {REFERENCE!r}, {COPY!r} or {INLINE!r}. Nothing was written."
        )
    if order.check_placement not in (None, CUDA):
        raise PlanError(f"check_placement is {order.check_placement!r} and is {CUDA!r}. Nothing was written.")
    if order.prefix not in (BAKED, FILE):
        raise PlanError(f"prefix is {order.prefix!r} and is {BAKED!r} or {FILE!r}. Nothing was written.")


def _export(order: Order, listen: Listener) -> Report:
    if order.weights in (COPY, INLINE):
        return export_copied(order, "", listen)
    try:
        return export_by_reference(order, listen)
    except NotReferable as error:
        if order.weights == REFERENCE:
            raise
        return export_copied(order, error.reason, listen)
