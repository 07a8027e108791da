"""remove: take an adapter off a live model, or out of a checkpoint that was saved with tuner modules inside."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from peftsurgery.adapter import Adapter
from peftsurgery.commands.companions import carry
from peftsurgery.commands.report import Report, size
from peftsurgery.disk import extract
from peftsurgery.disk.checkpoint import open_checkpoint
from peftsurgery.disk.locate import locate
from peftsurgery.disk.writer import staged
from peftsurgery.errors import PlanError
from peftsurgery.events import Listener, ignore

if TYPE_CHECKING:
    from torch import nn


def remove(
    model: nn.Module | str | Path,
    name: str | None = None,
    *,
    out: str | Path | None = None,
    adapter_out: str | Path | None = None,
    listen: Listener = ignore,
) -> Adapter | Report:
    """Take an adapter off a live model, bit-exactly, and return it; or dissect a checkpoint directory.

    A checkpoint that was saved with tuner modules in it (`…base_layer.weight`, `…lora_A.default.weight`)
    becomes a clean base in `out` and, with `adapter_out`, an adapter directory in PEFT's format.

    Args:
        name: the adapter's name; not needed where there is only one.

    Raises:
        PlanError: there is no such adapter, or several and no name.
        CheckpointError: the checkpoint has no tuner modules in it.
    """
    if isinstance(model, str | Path):
        return _dissect(Path(locate(model)), name, out, adapter_out, listen)
    from peftsurgery.live import active, surgery

    return surgery.remove(model, _one(name, active.adapters(model)))


def _one(name: str | None, known: tuple[str, ...]) -> str:
    if name is None and len(known) != 1:
        raise PlanError(
            f"There are {len(known)} adapters ({', '.join(known)}): say which, e.g. `name='default'`."
        )
    return name if name is not None else known[0]


def _dissect(
    path: Path, name: str | None, out: str | Path | None, adapter_out: str | Path | None, listen: Listener
) -> Report:
    if out is None:
        raise PlanError(f"The clean base needs a place: `peftsurgery remove {path} -o CLEAN --adapter-out ADAPTER`.")
    checkpoint = open_checkpoint(path)
    cut = extract.dissect(checkpoint.tensors)
    chosen = _one(name, tuple(cut.adapters)) if adapter_out is not None else None
    ...
