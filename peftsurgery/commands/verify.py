"""verify: is what runs the thing that was trained?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from peftsurgery.adapter import Adapter, check
from peftsurgery.commands.adapter_files import Adapters, gather
from peftsurgery.commands.exporting import parity_table
from peftsurgery.commands.operating import loaded, operated
from peftsurgery.commands.prefixed import plain
from peftsurgery.commands.report import Report
from peftsurgery.disk.checkpoint import INDEX, SINGLE
from peftsurgery.errors import PlanError
from peftsurgery.events import Event, Listener, ignore
from peftsurgery.reading import AS_PEFT, Reading

if TYPE_CHECKING:
    from torch import nn

    from peftsurgery.graph.parity import Parity, Runner
    from peftsurgery.graph.signature import Signature


def verify(
    model: nn.Module | str | Path,
    against: nn.Module | str | Path,
    *,
    adapters: Adapters = (),
    weight: Sequence[float] = (),
    task: str | None = None,
    tolerance: float | None = None,
    bits: bool = False,
    sample: int | None = None,
    reading: Reading = AS_PEFT,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    listen: Listener = ignore,
) -> Report:
    """Run two models on the same inputs, several batches and lengths, padded ones too, and compare.

    Outputs per token are compared where tokens are attended.

    Args:
        model: a live module, a model directory, an export's directory, or an `.onnx` file.
        against: what it should equal: a live module or a model directory.
        adapters: what `against` wears; grafted, not merged.
        weight: a factor for each adapter's effect.
        task: the task, where the files do not say it.
        tolerance: the largest absolute difference allowed; by default that of the wider-rounding dtype.
        bits: run nothing; make every tensor of a merged checkpoint again from base and adapters, and compare bits.
        sample: with `bits`, how many touched and how many other tensors to compare; all by default.
        reading: how `against` reads virtual tokens, where it is not as in PEFT.

    Raises:
        ParityError: they differ by more; it says at which output and by how much.
        PlanError: `against` is a graph, or `bits` are asked of what is no checkpoint.
    """
    if bits or sample is not None:
        return _bits(model, against, adapters, weight, task, sample, allow_pickle, trust_remote_code, listen)
    from peftsurgery.graph import parity

    if _graphs(against) and not _checkpoint(against):
        raise PlanError(
            f"{against} is a graph; the reference of a comparison is a torch model. Swap the two: "
            f"`peftsurgery verify {against} --against MODEL`."
        )
    given = [check(a) for a in gather(adapters, weight, allow_pickle=allow_pickle)] if adapters else []
    listen(Event("verify", "loading", 0, 2))
    worn = (given, task, trust_remote_code, reading)
    found = parity.check(_compared(model, against, worn, tolerance, listen))
    facts = {
        "model": _said(model),
        "against": _said(against),
        "provider": found.provider,
        "parity": found.to_dict(),
    }
    return Report("verify", f"They agree: {found}.", facts, parity_table(found))


def _bits(
    model: nn.Module | str | Path,
    against: nn.Module | str | Path,
    adapters: Adapters,
    weight: Sequence[float],
    task: str | None,
    sample: int | None,
    allow_pickle: bool,
    trust_remote_code: bool,
    listen: Listener,
) -> Report:
    from peftsurgery.commands.verify_merged import verify_merged

    if not isinstance(model, str | Path) or not isinstance(against, str | Path):
        raise PlanError("`bits` compares directories. Save the model first, or leave `bits` out to run both.")
    given = gather(adapters, weight, allow_pickle=allow_pickle)
    return verify_merged(
        model,
        against,
        [check(adapter) for adapter in given],
        task=task,
        sample=sample,
        trust_remote_code=trust_remote_code,
        listen=listen,
    )


def _compared(
    model: nn.Module | str | Path,
    against: nn.Module | str | Path,
    worn: tuple[list[Adapter], str | None, bool, Reading],
    tolerance: float | None,
    listen: Listener,
) -> Parity:
    from peftsurgery.graph import parity

    given, task, trust_remote_code, reading = worn
    with (
        operated(against, given, True, task, trust_remote_code, reading) as reference,
        plain(reference, task) as bare,
    ):
        said, dtype = bare.signature, _dtype(reference)
        runner, other = _runner(model, said, trust_remote_code)
        widest = max(parity.tolerance(dtype), parity.tolerance(other))
        allowed = widest if tolerance is None else tolerance
        listen(Event("verify", "comparing", 1, 2))
        right = parity.torch_runner(reference, said, bare.prefix)
        return parity.compare(runner, right, said, tolerance=allowed)


def _runner(model: nn.Module | str | Path, said: Signature, trust: bool) -> tuple[Runner, torch.dtype]:
    """What runs `model`, and the dtype it computes in."""
    from peftsurgery.graph import parity
    from peftsurgery.graph.pair import opened

    graphs = _graphs(model)
    if graphs:
        return opened(graphs), torch.float32
    live = loaded(model, [], said.task, trust) if isinstance(model, str | Path) else model
    return parity.torch_runner(live, said), _dtype(live)


def _graphs(model: nn.Module | str | Path) -> tuple[Path, ...]:
    """The `.onnx` files that `model` is, or holds."""
    from peftsurgery.graph.pair import graphs

    return graphs(Path(model)) if isinstance(model, str | Path) else ()


def _checkpoint(model: nn.Module | str | Path) -> bool:
    """Whether a directory holds a checkpoint, be there a graph beside it or not."""
    return isinstance(model, str | Path) and any((Path(model) / name).is_file() for name in (SINGLE, INDEX))


def _dtype(live: nn.Module) -> torch.dtype:
    return next(p.dtype for p in live.parameters() if p.is_floating_point())


def _said(model: nn.Module | str | Path) -> str:
    return str(model) if isinstance(model, str | Path) else type(model).__name__
