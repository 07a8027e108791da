"""convert: an adapter from one library's format to the other's, where both compute the same with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from peftsurgery.adapter import Adapter
from peftsurgery.commands.adapter_files import ADAPTERHUB, PEFT, WRITERS, gather, save_adapter
from peftsurgery.commands.basing import based
from peftsurgery.commands.report import Report
from peftsurgery.errors import AdapterError, PlanError, listing
from peftsurgery.method import TABLE, TokenMethod
from peftsurgery.reading import AS_PEFT, Reading
from peftsurgery.site import Kind

SEQ2SEQ, FEATURES = "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"
POSITIONS = (
    "Call the model with `position_ids` that begin at {count}: AdapterHub's library numbers words from 0."
)
ROLLED = (
    "The positions that make up for AdapterHub's numbering are in the file as `modules_to_save`; inputs are "
    "{count} tokens shorter at most, as with every prefix in PEFT."
)


def convert(
    adapter: Adapter | str | Path,
    *,
    to: str,
    out: str | Path,
    base: str | Path | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Report:
    """Write an adapter in PEFT's or AdapterHub's format, when the other library computes the same with it.

    LoRA is exact both ways. A flat prefix is exact when its words keep their positions: PEFT numbers them from n
    on, AdapterHub from 0. So for PEFT the base's table of positions is written beside the prefix, rolled by n, which
    needs `base`; for AdapterHub the report says what to call the model with. What is not exact is refused.

    Args:
        adapter: an `Adapter`, a directory in either format, or a hub id in the local cache.
        to: `peft` or `adapterhub`.
        out: the directory to write.
        base: the model that the adapter is for: its names, its architecture (which a head needs) and, for a prefix,
            its positions.
        allow_pickle: read a `.bin` where there is no `.safetensors` (with `weights_only=True`).
        trust_remote_code: run the Python code that the base's directory brings.

    Raises:
        PlanError: `to` is no format.
        AdapterError: the adapter cannot be understood, or is not exactly convertible, and why.
        UnclaimedSites, MismatchedTensors: it does not fit `base`.
        CheckpointError: `out` is not empty, or cannot be written.
    """
    if to not in WRITERS:
        raise PlanError(f"{to!r} is no format. Take one of {listing(list(WRITERS))} (`--to peft`).")
    given = gather(adapter, allow_pickle=allow_pickle)[0]
    _check_exact(given, to)
    fitted = given if base is None else based(given, base, trust_remote_code)
    made, hint = _positioned(fitted, to, base, trust_remote_code) if _is_prefix(given) else (fitted, "")
    save_adapter(made, out, format=to)
    methods = dict.fromkeys(step.method.name for step in made.plan.steps)
    facts = {
        "to": to,
        "method": " + ".join(methods),
        "sites": len(made.plan.steps),
        "parameters": made.num_parameters,
        "replaces": list(made.replaced),
        "out": str(out),
    }
    return Report(
        "convert", f"Converted the adapter to {_words(to)} format.", facts, hint=hint or _then(to, out)
    )


def _check_exact(adapter: Adapter, to: str) -> None:
    """Raise an AdapterError for what the other library would compute otherwise."""
    method = adapter.plan.steps[0].method
    if isinstance(method, TokenMethod) and method.baked() is not method:
        raise AdapterError(
            "The prefix or prompt has an encoder, which the two libraries keep in different ways. Evaluate it first: "
            "`peftsurgery bake ADAPTER -o BAKED`, then convert that."
        )
    if _is_prefix(adapter) and to == ADAPTERHUB and adapter.task_type == SEQ2SEQ:
        raise AdapterError(
            "PEFT's prefix of an encoder-decoder stands in the decoder alone and is cut for caches of four entries a "
            "layer; AdapterHub has three groups of its own. No file says the same for both: keep PEFT's format."
        )


def _positioned(
    adapter: Adapter, to: str, base: str | Path | None, trust_remote_code: bool
) -> tuple[Adapter, str]:
    """The prefix as the other library reads it, and what the caller has to do for it."""
    count = adapter.shared[TABLE].shape[0]
    shifted = adapter.reading.position_shift
    if to == PEFT and not shifted:
        return _rolled(adapter, _needed(base), count, trust_remote_code), ROLLED.format(count=count)
    if to == ADAPTERHUB and shifted:
        table = None if base is None else _table(adapter, base, trust_remote_code)
        if table is not None and table[0] in adapter.replaced:
            return _unrolled(adapter, table, count), ""
        return adapter, POSITIONS.format(count=count)
    return adapter, ""


def _rolled(adapter: Adapter, base: str | Path, count: int, trust_remote_code: bool) -> Adapter:
    """The prefix with the base's positions, moved so that position n + i is what i was."""
    found = _table(adapter, base, trust_remote_code)
    if found is None:
        raise AdapterError(
            "The base computes its positions and has no table of them, so none can be moved to make up for PEFT's "
            "numbering. Keep AdapterHub's format: peftsurgery reads it."
        )
    name, table, first = found
    moved = torch.cat([table[:first], table[first:].roll(count, 0)])
    heads = (*adapter.plan.modules_to_save, name.removesuffix(".weight"))
    plan = replace(adapter.plan, modules_to_save=heads)
    made = replace(adapter, plan=plan, replaced={**adapter.replaced, name: moved}, reading=AS_PEFT)
    return replace(made, task_type=adapter.task_type or FEATURES)  # without one PEFT passes over a prefix


def _unrolled(adapter: Adapter, found: tuple[str, Tensor, int], count: int) -> Adapter:
    """The prefix without positions that were rolled for PEFT: AdapterHub needs none.

    Raises:
        AdapterError: they are others.
    """
    name, table, first = found
    if not torch.equal(adapter.replaced[name], torch.cat([table[:first], table[first:].roll(count, 0)])):
        raise AdapterError(
            f"The adapter brings {name!r} of its own, which is not the base's moved by {count}, and AdapterHub's "
            "format holds none. Keep PEFT's format."
        )
    rest = {key: tensor for key, tensor in adapter.replaced.items() if key != name}
    return replace(adapter, replaced=rest, reading=Reading(position_shift=False))


def _table(adapter: Adapter, base: str | Path, trust_remote_code: bool) -> tuple[str, Tensor, int] | None:
    """The base's table of positions: its name, its values and the row of the first word; None if it has none."""
    from peftsurgery.disk.locate import locate
    from peftsurgery.live import anatomy, pretrained
    from peftsurgery.tasks import task

    known = task(adapter.task_type) if adapter.task_type else None
    brought = [name.rpartition(".")[0] for name in adapter.replaced]
    model = pretrained.load(locate(base), task=known, fresh=brought, trust_remote_code=trust_remote_code)
    found = anatomy.position_table(model)
    if found is None:
        return None
    name, module, first = found
    return f"{name}.weight", module.weight.detach(), first


def _needed(base: str | Path | None) -> str | Path:
    if base is None:
        raise AdapterError(
            "The prefix was trained with words that are numbered from 0, as in AdapterHub, and PEFT numbers them from "
            "n on. Name the base, whose table of positions can make up for it: `convert … --to peft --base MODEL`."
        )
    return base


def _is_prefix(adapter: Adapter) -> bool:
    return adapter.plan.sites[0].kind is Kind.ATTENTION


def _words(to: str) -> str:
    return "PEFT's" if to == PEFT else "AdapterHub's"


def _then(to: str, out: str | Path) -> str:
    if to == PEFT:
        return f"PeftModel.from_pretrained(base, {str(out)!r})"
    return f"model.load_adapter({str(out)!r}, use_safetensors=True)"
