"""remove: take an adapter off a live model, or out of a checkpoint that was saved with tuner modules inside."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from peftsurgery.adapter import Adapter, check
from peftsurgery.commands.adapter_files import save_adapter
from peftsurgery.commands.companions import carry
from peftsurgery.commands.report import Report, size
from peftsurgery.disk import extract, peft
from peftsurgery.disk.checkpoint import Checkpoint, load, open_checkpoint
from peftsurgery.disk.durable import staged
from peftsurgery.disk.locate import locate
from peftsurgery.disk.peft_config import parse
from peftsurgery.disk.peft_keys import understood
from peftsurgery.errors import PlanError, listing
from peftsurgery.events import Listener, ignore
from peftsurgery.method import Method
from peftsurgery.methods import METHODS

if TYPE_CHECKING:
    from torch import nn

RANKED = ("lora_A.weight", "lora_embedding_A")


def remove(
    model: nn.Module | str | Path,
    name: str | None = None,
    *,
    method: Method | None = None,
    out: str | Path | None = None,
    adapter_out: str | Path | None = None,
    listen: Listener = ignore,
) -> Adapter | Report:
    """Take an adapter off a live model, bit-exactly, and return it; or dissect a checkpoint directory.

    A checkpoint that was saved with tuner modules in it (`…base_layer.weight`, `…lora_A.default.weight`)
    becomes a clean base in `out` and, with `adapter_out`, an adapter directory in PEFT's format.

    Args:
        name: the adapter's name; not needed where there is only one.
        method: what the adapter in a checkpoint is, e.g. `LoRA(lora_alpha=16)`: such a checkpoint holds
            the ranks, and nothing else of it. Not needed where an `adapter_config.json` lies beside it.

    Raises:
        PlanError: there is no such adapter, or several and no name.
        CheckpointError: the checkpoint has no tuner modules in it.
    """
    if isinstance(model, str | Path):
        return _dissect(locate(model), name, method, out, adapter_out, listen)
    from peftsurgery.live import active, surgery

    return surgery.remove(model, _one(name, active.adapters(model)))


def _one(name: str | None, known: tuple[str, ...]) -> str:
    if (name is None and len(known) == 1) or name in known:
        return name or known[0]
    raise PlanError(
        f"There are {len(known)} adapters ({listing(known) or 'none'}). Name one of them: `name=…` (`--name`)."
    )


def _dissect(
    path: Path,
    name: str | None,
    method: Method | None,
    out: str | Path | None,
    adapter_out: str | Path | None,
    listen: Listener,
) -> Report:
    if out is None:
        raise PlanError(
            f"The clean base needs a place: `peftsurgery remove {path} -o CLEAN --adapter-out ADAPTER`."
        )
    checkpoint = open_checkpoint(path)
    cut = extract.dissect(checkpoint.tensors)
    adapter = None
    if adapter_out is not None:
        adapter = _adapter(checkpoint, cut, _one(name, tuple(cut.adapters)), method)
    with staged(Path(out)) as directory:
        done = extract.extract(checkpoint, cut, directory, listen=listen)
        carry(path, directory)
        if adapter is not None and adapter_out is not None:
            save_adapter(adapter, adapter_out)
    facts = {
        "tensors": done.num_tensors,
        "size": size(done.nbytes),
        "adapters": list(cut.adapters),
        "out": str(out),
        "adapter_out": None if adapter_out is None else str(adapter_out),
    }
    hint = "" if adapter_out is None else f"peftsurgery merge {out} {adapter_out} -o MERGED"
    return Report("remove", f"Took {listing(tuple(cut.adapters))} out of {path}.", facts, hint=hint)


def _adapter(checkpoint: Checkpoint, cut: extract.Dissection, name: str, method: Method | None) -> Adapter:
    stored = checkpoint.tensors
    tensors = {key: load(stored[held]).clone() for key, held in cut.adapters[name].items()}
    file = checkpoint.path / peft.CONFIG
    raw = json.loads(file.read_text()) if file.is_file() else _config(tensors, method)
    return check(understood(parse(raw, METHODS), tensors, name))


def _config(tensors: Mapping[str, Tensor], method: Method | None) -> dict[str, object]:
    """The configuration that such a checkpoint does not hold, from the method that was said and the ranks."""
    if method is None:
        raise PlanError(
            "The checkpoint does not say how strongly its adapter works. Give its lora_alpha (`--alpha 16`, "
            "`method=LoRA(lora_alpha=16)`), or leave out `--adapter-out`; nothing was written."
        )
    ranks = {
        key.removeprefix(extract.PREFIX).removesuffix(f".{end}"): tensor.shape[0]
        for key, tensor in tensors.items()
        for end in RANKED
        if key.endswith(end)
    }
    common = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    return {
        "peft_type": method.peft_type,
        **asdict(method),
        "r": common,
        "rank_pattern": {site: rank for site, rank in ranks.items() if rank != common},
        "target_modules": list(ranks),
    }
