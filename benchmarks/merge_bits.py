"""Whether a merge of ours holds PEFT's bits, whatever it is cut into; part of `python -m benchmarks.merge`.

python -m benchmarks.merge_bits DIRECTORY ADAPTER
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.checkpoints import ADAPTERS, ALPHA, RANK
from benchmarks.merge import ours, timed
from peftsurgery.disk.checkpoint import Stored, load, open_checkpoint
from peftsurgery.disk.shard import read_shard

OTHERWISE = """
import dataclasses, sys, torch
import peftsurgery as ps
from peftsurgery import fold
from peftsurgery.disk import engines, pieces, writer
block, tile, threads = map(int, sys.argv[4:])
pieces.blocks.__defaults__ = ("cpu", block)
writer.BLOCK, fold.TILE["cpu"] = block, tile
engines.write_shard = lambda task, listen: writer.write_shard(dataclasses.replace(task, threads=threads), listen)
torch.set_num_threads(threads)
ps.merge(sys.argv[1], sys.argv[2], out=sys.argv[3])
"""
FORMS = ((1 << 20, 1 << 14, 1), (3_000_000, 1 << 20, 3), (32 << 20, 1 << 22, 8))
"""Bytes of a block, elements of a tile, threads."""


def fidelity(room: Path, name: str) -> dict[str, Any]:
    """Elements of ours that differ from PEFT's, and from ours in other blocks; the share off the rounded truth."""
    out = room / "ours"
    timed(*ours(room, name, out))
    mine, theirs = (open_checkpoint(path).tensors for path in (out, room / f"PEFT {name}"))
    assert mine.keys() == theirs.keys()
    differ = sum(int((load(mine[tensor]) != load(theirs[tensor])).sum()) for tensor in mine)
    forms = [same(room, name, mine, form) for form in FORMS]
    off, counted = truth(room, name, mine)
    shutil.rmtree(out)
    return {
        "tensors": len(mine),
        "elements off PEFT's": differ,
        "other forms equal": forms,
        "off": off,
        "of": counted,
    }


def same(room: Path, name: str, mine: Mapping[str, Stored], form: tuple[int, int, int]) -> bool:
    out = room / "otherwise"
    timed(sys.executable, "-c", OTHERWISE, room / "base", room / name, out, *map(str, form))
    again = open_checkpoint(out).tensors
    equal = all(torch.equal(load(mine[tensor]), load(again[tensor])) for tensor in mine)
    shutil.rmtree(out)
    return equal


def truth(room: Path, name: str, mine: Mapping[str, Stored]) -> tuple[int, int]:
    """How many elements of the first layer are not the bf16 number nearest to the float64 result, of how many."""
    before = open_checkpoint(room / "base").tensors
    (file,) = (room / name).glob("*.safetensors")
    held = open_adapter(file)
    off = counted = 0
    for target in ADAPTERS[name]:
        tensor = f"model.layers.0.{target}.weight"
        a, b = (held[f"base_model.model.model.layers.0.{target}.lora_{x}.weight"].double() for x in "AB")
        was, found = load(before[tensor]), load(mine[tensor])
        for rows in torch.arange(was.shape[0]).split(512):
            exact = was[rows].double() + (ALPHA / RANK) * (b[rows] @ a)
            off += misrounded(found[rows], exact)
        counted += was.numel()
    return off, counted


def open_adapter(file: Path) -> dict[str, Tensor]:
    return {stored.name: load(stored) for stored in read_shard(file).tensors}


def misrounded(found: Tensor, exact: Tensor) -> int:
    """Elements that have a neighbour in bf16 which is nearer to the exact one."""
    apart = (found.double() - exact).abs()
    bits = found.view(torch.int16)
    beside = [(bits + step).view(torch.bfloat16).double() for step in (-1, 1)]
    return int(((beside[0] - exact).abs().lt(apart) | (beside[1] - exact).abs().lt(apart)).sum())


if __name__ == "__main__":
    print(json.dumps(fidelity(Path(sys.argv[1]), sys.argv[2])))
