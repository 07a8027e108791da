"""Folding adapters into a checkpoint: the same files again, in blocks of a few megabytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from peftsurgery.adapter import Adapter
from peftsurgery.disk.checkpoint import Checkpoint, Stored
from peftsurgery.disk.parts import finish, outline, written_dtype
from peftsurgery.disk.pieces import Piece
from peftsurgery.disk.writer import ShardDone, ShardTask
from peftsurgery.errors import (
    CheckpointError,
    MismatchedTensors,
    UnclaimedSites,
    UnsupportedSite,
    listing,
    nearest,
)
from peftsurgery.fold import touches
from peftsurgery.method import WeightMethod
from peftsurgery.tally import Tally

PLAIN = ("F64", "F32", "F16", "BF16")
"""The dtypes that hold a weight's own value, so that adding to it means something."""
QUANTISED = (
    "qweight",
    "weight_packed",
    "weight_scale",
    "weight_scale_inv",
    "weight.absmax",
    "weight.quant_map",
    "SCB",
    "_weight_qdata",
)
"""What stands beside, or instead of, a quantised weight.

GPTQ and AWQ, compressed-tensors, FP8, bitsandbytes, torchao.
"""


@dataclass(frozen=True, slots=True)
class Planned:
    """What a merge will write.

    Args:
        tasks: its weight files.
        folded: the tensors of the base that the adapters change, by their names in the output.
        added: the tensors that the base does not hold: heads, and twins that are tied no longer.
        index: the metadata of the base's index, where it has one.
    """

    tasks: tuple[ShardTask, ...]
    folded: tuple[str, ...]
    added: tuple[str, ...]
    index: Mapping[str, object] | None


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge wrote.

    Args:
        folded, added: as they were planned.
        files: the weight files, and the index where there is one.
        nbytes: the size of all tensors.
        tallies: how far every changed tensor moved, where that was asked for.
    """

    folded: tuple[str, ...]
    added: tuple[str, ...]
    files: tuple[str, ...]
    nbytes: int
    num_tensors: int
    tallies: Mapping[str, Tally]


def identity(name: str) -> str:
    """The renaming that renames nothing."""
    return name


def finished(directory: Path, planned: Planned, done: Iterable[ShardDone]) -> Merged:
    """Write the index over the files that were planned and are there, and say what was done."""
    held = finish(directory, planned.tasks, done, planned.index)
    return Merged(planned.folded, planned.added, held.files, held.nbytes, held.num_tensors, held.tallies)


def plan(
    checkpoint: Checkpoint,
    adapters: Sequence[Adapter],
    directory: Path,
    *,
    rename: Callable[[str], str] = identity,
    twins: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | None = None,
    device: str = "cpu",
    measure: int = 0,
    metadata: Mapping[str, str] | None = None,
) -> Planned:
    """What to write so that `directory` holds `checkpoint` with every adapter folded into it; headers tell it all.

    Files, their tensors' order and their metadata stay. Folding is done in float32 and rounded once. What an
    adapter replaces and the base lacks (a fresh head) is added to the last file, in the base's dtype.

    Args:
        adapters: in the names of the output, fitted to it.
        rename: from the checkpoint's names to the output's.
        twins: tensors to add because they are tied no longer → those whose value they have, in output names.
        dtype: of every floating tensor of the output; its own by default.
        max_shard_size: bytes of tensors in a file; the base's own files by default.
        device: where folding is computed.
        measure: every how many-th tile is measured, to tell how far its tensor moved; 0 for none.
        metadata: what the files say of themselves that hold a tensor which an adapter changes.

    Raises:
        UnclaimedSites, UnsupportedSite, MismatchedTensors: a tensor that the adapters change is not there, is
            quantised, or has another shape; nothing is written.
    """
    present = {rename(name): stored for name, stored in checkpoint.tensors.items()}
    copies = _copies(present, twins or {})
    known = present | copies
    heads = _heads(known, adapters)
    _check(known, heads, adapters, casts=dtype is not None)
    changes = touches(*adapters)
    added = [Piece(n, written_dtype(s.torch_dtype, dtype), s, changes.get(n, ())) for n, s in copies.items()]
    own = _main_dtype(checkpoint)
    added += [Piece(n, written_dtype(t.dtype, dtype or own), t, changes[n]) for n, t in heads.items()]
    tasks = outline(
        checkpoint,
        directory,
        rename,
        changes=changes,
        dtype=dtype,
        added=added,
        max_shard_size=max_shard_size,
    )
    tasks = tuple(
        replace(task, device=device, measure=measure, metadata={**task.metadata, **(metadata or {})})
        if any(piece.changes for piece in task.pieces)
        else task
        for task in tasks
    )
    found = tuple(name for name in changes if name not in heads)
    return Planned(tasks, found, tuple(piece.name for piece in added), checkpoint.index)


def _copies(present: Mapping[str, Stored], twins: Mapping[str, str]) -> dict[str, Stored]:
    """The tensors that the output holds by themselves from now on, each with what it was tied to."""
    for twin, holder in twins.items():
        if holder not in present or twin in present:
            raise CheckpointError(
                f"{twin!r} cannot be untied from {holder!r}: the base must hold the second and not the "
                "first. Nothing was written."
            )
    return {twin: present[holder] for twin, holder in twins.items()}


def _heads(present: Collection[str], adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """What the adapters replace and the base lacks; the last adapter's word counts, as in folding."""
    brought = {name: value.detach() for adapter in adapters for name, value in adapter.replaced.items()}
    return {name: value for name, value in brought.items() if name not in present}


def _main_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The floating dtype in which most of the checkpoint is stored."""
    sizes: Counter[torch.dtype] = Counter()
    for stored in checkpoint.tensors.values():
        if stored.dtype in PLAIN:
            sizes[stored.torch_dtype] += stored.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def _check(
    present: Mapping[str, Stored], heads: Mapping[str, Tensor], adapters: Sequence[Adapter], *, casts: bool
) -> None:
    """Refuse, before anything is written, what folding would stumble over or get wrong."""
    expected = list(_expected(adapters))
    _check_plain([name for name, _, floating in expected if floating], present, casts=casts)
    _check_claimed([name for name in touches(*adapters) if name not in heads], present)
    for name, shape, _ in expected:
        found = present[name].shape if name in present else tuple(heads[name].shape)
        if found != shape:
            raise MismatchedTensors(
                f"{name!r} is {found} in the base and the adapter expects {shape}. "
                "Take the base that the adapter was trained on; nothing was written.",
                unexpected=[name],
            )


def _expected(adapters: Sequence[Adapter]) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Every tensor that the adapters change: its name, its shape, whether its numbers are floating."""
    for adapter in adapters:
        for step in adapter.plan.steps:
            yield step.site.weight, step.site.shape, True
            if isinstance(step.method, WeightMethod) and step.method.moves_bias:
                yield step.site.bias, (step.site.matrix_shape[0],), True
        for name, value in adapter.replaced.items():
            yield name, tuple(value.shape), value.is_floating_point()


def _check_plain(touched: Sequence[str], present: Mapping[str, Stored], *, casts: bool) -> None:
    """Refuse to fold into, or to cast, numbers that mean nothing without their scales."""
    suffixes = tuple(f".{word}" for word in QUANTISED)
    packed = {name.removesuffix(s): name for name in present for s in suffixes if name.endswith(s)}
    for name in touched:
        site = name.rpartition(".")[0]
        if site in packed or (name in present and present[name].dtype not in PLAIN):
            raise _quantised(name, packed.get(site, name), present)
    if casts and packed:
        site, witness = next(iter(packed.items()))
        raise _quantised(f"{site}.weight", witness, present)


def _quantised(name: str, witness: str, present: Mapping[str, Stored]) -> UnsupportedSite:
    return UnsupportedSite(
        f"{name!r} is quantised in the base ({witness!r} is {present[witness].dtype}), and its "
        "stored numbers are not its values. Merge into the unquantised base and quantise the result; "
        "nothing was written.",
        site=name.rpartition(".")[0],
    )


def _check_claimed(touched: Sequence[str], present: Mapping[str, Stored]) -> None:
    lost = [name for name in touched if name not in present]
    if lost:
        near = nearest(lost[0], present)
        raise UnclaimedSites(
            f"The base lacks {len(lost)} of the {len(touched)} tensors that the adapter changes: "
            f"{listing(lost)}. Nearest there: {listing(near) or 'nothing'}. Take the base that the "
            "adapter was trained on; nothing was written.",
            sites=lost,
            nearest=near,
        )
