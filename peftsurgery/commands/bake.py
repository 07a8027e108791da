"""bake: evaluate what does not depend on the input: an encoder becomes the tokens that it gives."""

from __future__ import annotations

from pathlib import Path

from peftsurgery.adapter import Adapter
from peftsurgery.adapter import bake as baked
from peftsurgery.commands.adapter_files import load_adapter, save_adapter
from peftsurgery.commands.basing import based
from peftsurgery.commands.report import Report
from peftsurgery.errors import PlanError
from peftsurgery.method import TABLE, TokenMethod


def bake(
    adapter: Adapter | str | Path,
    *,
    out: str | Path | None = None,
    base: str | Path | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Adapter | Report:
    """Replace an encoder by its output: p-tuning becomes a prompt table, a projected prefix keys and values.

    The tokens are bit for bit what the encoder gives in evaluation mode on the CPU. Baking twice is baking
    once, and a method without an encoder (LoRA too) stays as it is. An `Adapter` comes back as one, unless
    `out` is given; a directory needs `out`, which then holds an adapter that PEFT loads.

    Args:
        adapter: an `Adapter`, a directory, or a hub id in the local cache.
        out: the directory to write.
        base: a model directory that the tokens have to fit, recorded as the adapter's base.
        allow_pickle: read a `.bin` where there is no `.safetensors` (with `weights_only=True`).
        trust_remote_code: run the Python code that the base's directory brings.

    Raises:
        PlanError: a directory, and no `out`.
        AdapterError: the adapter cannot be understood, or does not fit `base`.
        UnclaimedSites: the base has not the places for its tokens.
        CheckpointError: `out` is not empty, or cannot be written.
    """
    if isinstance(adapter, str | Path) and out is None:
        raise PlanError(f"The baked adapter needs a place of its own: `peftsurgery bake {adapter} -o OUT`.")
    given = adapter if isinstance(adapter, Adapter) else load_adapter(adapter, allow_pickle=allow_pickle)
    made = baked(given if base is None else based(given, base, trust_remote_code))
    if out is None:
        return made
    save_adapter(made, out)
    return _report(given, made, str(out))


def _method(adapter: Adapter) -> TokenMethod | None:
    return next((s.method for s in adapter.plan.steps if isinstance(s.method, TokenMethod)), None)


def _report(given: Adapter, made: Adapter, out: str) -> Report:
    before, after = _method(given), _method(made)
    facts = {
        "method": None if after is None else after.name,
        "was": None if before is None else before.name,
        "tokens": "" if after is None else " × ".join(map(str, made.shared[TABLE].shape)),
        "parameters": made.num_parameters,
        "parameters_before": given.num_parameters,
        "base": made.base,
        "out": out,
    }
    if before == after:
        headline = "There was nothing to bake: the adapter has no encoder, and was written as it is."
    else:
        headline = "Baked the encoder into the tokens that it gives."
    hint = f"peftsurgery export-onnx {made.base or 'MODEL'} --adapter {out} -o ONNX"
    return Report("bake", headline, facts, hint=hint)
