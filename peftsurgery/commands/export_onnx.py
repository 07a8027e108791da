"""export-onnx: a model, its adapters merged or factored, as a graph that was compared with torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from peftsurgery import __version__
from peftsurgery.adapter import Adapter, bake, check
from peftsurgery.commands.adapter_files import Adapters, gather
from peftsurgery.commands.companions import carry, merged_config
from peftsurgery.commands.fitting import common_task, labels
from peftsurgery.commands.report import Report, size
from peftsurgery.disk.locate import locate
from peftsurgery.disk.writer import staged, write_json
from peftsurgery.errors import PlanError
from peftsurgery.events import Event, Listener, ignore
from peftsurgery.live import pretrained, soft, surgery
from peftsurgery.live.active import canonical_name
from peftsurgery.live.merge import merge as merge_live
from peftsurgery.method import TokenMethod, WeightMethod
from peftsurgery.reading import AS_PEFT, Reading
from peftsurgery.tasks import task as task_named

if TYPE_CHECKING:
    from torch import nn

    from peftsurgery.graph.parity import Parity
    from peftsurgery.graph.signature import Signature


class _Weights(NamedTuple):
    """Where the weights go: into a file beside the graph, and which export's they may share."""

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
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    listen: Listener = ignore,
) -> Report:
    """Export an encoder to ONNX, dynamic in batch and length, and verify it in ONNX Runtime.

    `out` receives `model.onnx` (and `model.onnx_data` past 2 GB), `config.json`, the tokenizer and
    `peftsurgery.json`, the certificate of the comparison. Every initializer keeps its parameter's name.

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

    Raises:
        UnsupportedModel: no export for this architecture or task.
        ParityError: ONNX Runtime does not agree with torch; nothing is left at `out`.
        AdapterError, FoldError, CheckpointError, PlanError.
    """
    given = [check(a) for a in gather(adapters, weight, allow_pickle=allow_pickle)] if adapters else []
    with (
        staged(Path(out)) as directory,
        operated(model, given, factored, task, trust_remote_code, reading) as live,
    ):
        kept = _Weights(external_weights, share_weights)
        signature = _write_graph(model, live, directory, task, opset, kept, listen)
        listen(Event("export", "verifying", 2, 3))
        parity = _verified(live, signature, directory, tolerance) if verify else None
        write_json(directory / "peftsurgery.json", _certificate(live, given, factored, opset, parity))
        nbytes = sum(file.stat().st_size for file in directory.glob("model.onnx*"))
        listen(Event("export", "done", 3, 3))
        return _report(live, given, factored, out, nbytes, signature, parity)


def _write_graph(
    model: nn.Module | str | Path,
    live: nn.Module,
    directory: Path,
    task: str | None,
    opset: int,
    kept: _Weights,
    listen: Listener,
) -> Signature:
    from peftsurgery.graph import weights

    listen(Event("export", "tracing", 0, 3))
    traced, signature = _traced(live, task, opset)
    listen(Event("export", "writing", 1, 3))
    if kept.shared is not None:
        weights.share(traced, Path(kept.shared) / "model.onnx", directory)
    weights.save(traced, directory, inline=0 if kept.external else weights.INLINE)
    _companions(model, live, directory)
    return signature


@contextmanager
def operated(
    model: nn.Module | str | Path,
    adapters: list[Adapter],
    factored: bool,
    task: str | None,
    trust: bool,
    reading: Reading = AS_PEFT,
) -> Iterator[nn.Module]:
    """The live model with the adapters merged or, factored, grafted; a live one is as before afterwards.

    Virtual tokens, bottlenecks and fusions have no weight to be merged into: they are grafted in either case,
    the tokens baked.
    """
    _check_reading(adapters, reading)
    live = loaded(model, adapters, task, trust) if isinstance(model, str | Path) else model
    merged = [] if factored else [adapter for adapter in adapters if not _stays(adapter)]
    undo: list[Callable[[], object]] = []
    try:
        if merged:
            undo.append(merge_live(live, *merged))
        for adapter in (adapter for adapter in adapters if adapter not in merged):
            way = reading if _has_tokens(adapter) else AS_PEFT
            surgery.inject(live, bake(adapter), trainable=False, reading=way)
            undo.append(partial(surgery.remove, live, adapter.name))
        yield live
    finally:
        for step in reversed(undo):
            step()


def _stays(adapter: Adapter) -> bool:
    """Whether no merge absorbs it: virtual tokens, bottlenecks and their fusions."""
    return any(not isinstance(step.method, WeightMethod) for step in adapter.plan.steps)


def _has_tokens(adapter: Adapter) -> bool:
    return any(isinstance(step.method, TokenMethod) for step in adapter.plan.steps)


def _check_reading(adapters: list[Adapter], reading: Reading) -> None:
    if reading != AS_PEFT and not any(_has_tokens(adapter) for adapter in adapters):
        raise PlanError(
            "There are no virtual tokens to be read in another way. Name a prompt or a prefix (`--adapter DIR`), "
            "or leave the way out; nothing was written."
        )


def loaded(model: str | Path, adapters: list[Adapter], task: str | None, trust: bool) -> nn.Module:
    """The model of a directory, of the task and with the labels that the adapters bring."""
    brought = [name.rpartition(".")[0] for adapter in adapters for name in adapter.replaced]
    return pretrained.load(
        locate(model),
        task=common_task(adapters, task),
        labels=labels(adapters),
        fresh=brought,
        trust_remote_code=trust,
    )


def signature_of(live: nn.Module, task: str | None) -> Signature:
    """The model's inputs and outputs; its virtual tokens take positions from the longest input."""
    from peftsurgery.graph.signature import signature

    said = signature(live, task_named(task).name if task is not None else None)
    return replace(said, longest=max(1, said.longest - soft.count(live))) if said.longest else said


def _traced(live: nn.Module, task: str | None, opset: int) -> tuple[Any, Signature]:
    from peftsurgery.graph.export import trace

    said = signature_of(live, task)
    tables, tokens = soft.named(live)
    names = partial(canonical_name, live)
    held = [names(table) for table in tables]
    return trace(live, said, names=names, opset=opset, tables=held, tokens=tokens), said


def _companions(model: nn.Module | str | Path, live: nn.Module, directory: Path) -> None:
    if isinstance(model, str | Path):
        carry(locate(model), directory)
        write_json(directory / "config.json", merged_config(locate(model), live, dtype=None, untied=False))
        return
    config: Any = live.config
    write_json(directory / "config.json", config.to_dict())


def _verified(live: nn.Module, signature: Any, directory: Path, tolerance: float | None) -> Parity:
    from peftsurgery.graph import parity
    from peftsurgery.graph.session import Session

    dtype = next(live.parameters()).dtype
    session = Session(directory / "model.onnx")
    found = parity.compare(
        session,
        parity.torch_runner(live, signature),
        signature,
        tolerance=parity.tolerance(dtype) if tolerance is None else tolerance,
    )
    parity.check(found)
    return found


def _certificate(
    live: nn.Module, adapters: list[Adapter], factored: bool, opset: int, parity: Parity | None
) -> dict[str, Any]:
    import onnxruntime
    import transformers

    return {
        "peftsurgery": __version__,
        "verb": "export-onnx",
        "architecture": type(live).__name__,
        "adapters": [{"name": a.name, "base": a.base} for a in adapters],
        "form": _form(adapters, factored),
        "opset": opset,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
        "parity": None if parity is None else parity.to_dict(),
    }


def _report(
    live: nn.Module,
    adapters: list[Adapter],
    factored: bool,
    out: str | Path,
    nbytes: int,
    signature: Signature,
    parity: Parity | None,
) -> Report:
    facts: dict[str, Any] = {
        "architecture": type(live).__name__,
        "form": _form(adapters, factored),
        "inputs": [port.name for port in signature.inputs],
        "outputs": [port.name for port in signature.outputs],
        "size": size(nbytes),
        "out": str(out),
        "parity": None if parity is None else parity.to_dict(),
    }
    table = parity_table(parity) if parity is not None else ()
    headline = (
        "Exported; not compared with torch." if parity is None else f"Exported, and verified: {parity}."
    )
    return Report("export-onnx", headline, facts, table, hint=f"run {out}/model.onnx with ONNX Runtime")


def parity_table(parity: Parity) -> list[tuple[str, ...]]:
    """The rows of a comparison: one per output and shape."""
    rows = [
        (row.output, f"{row.batch} × {row.length}", f"{row.max_abs_diff:.1e}", _share(row.top1_agreement))
        for row in parity.rows
    ]
    return [("output", "batch × length", "max |difference|", "same top-1"), *rows]


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _form(adapters: list[Adapter], factored: bool) -> str:
    forms = dict.fromkeys("factored" if factored else "grafted" if _stays(a) else "merged" for a in adapters)
    return " + ".join(forms) or "base"
