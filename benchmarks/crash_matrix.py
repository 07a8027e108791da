"""How many kills and errors a merge survives, in place and with -o: at every change of the disk, and at random times.

python -m benchmarks.crash_matrix

The work runs in a forked child on a small checkpoint. It is killed (SIGKILL) before every call that changes the disk,
with every write half done, and a hundred times at random; with -o every such call, and every read, also fails with
ENOSPC or EIO or is interrupted. After each, what is neither the old nor the new model must have no `config.json`. In
place, `unmerge` must give every file the SHA-256 that it had; with -o, `--resume` must end in the bytes of a merge that
nothing disturbed, with nothing beside them, and the inputs must be as they were.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import peftsurgery as ps
from peftsurgery.disk import halfway
from peftsurgery.errors import SurgeryError
from tests.cli.conftest import adapter_for, digest
from tests.cli.test_resume import resume_checked
from tests.conftest import MEMORY
from tests.strike import CHANGES, READS, points, struck, wait_for_threads
from tests.units.test_disk_merge import base, base_tensors, sharded
from tests.units.test_in_place import check_blind, digests, forgetful, patched, unpatched

RESULTS = Path(__file__).parent / "results" / "crash_matrix.json"
RANDOM_KILLS = 100


def at_every_change(room: Path, name: str, how: str) -> tuple[int, int]:
    """(kills, kills after which something was lost)."""
    model, undo, before, after = fresh(room, name)
    kills = lost = 0
    for _ in points(partial(patched, model, undo), how):
        kills += 1
        lost += not is_saved(model, undo, before, after)
    for _ in points(partial(unpatched, model, undo), how):
        kills += 1
        lost += not is_saved(model, undo, before, after)
        patched(model, undo)
    return kills, lost


def at_random_times(room: Path, name: str) -> tuple[int, int]:
    model, undo, before, after = fresh(room, name)
    chance, lost = random.Random(0), 0
    span = whole_time(model, undo)
    for _ in range(RANDOM_KILLS // 2):
        killed_after(chance.uniform(0, span), partial(back_and_forth, model, undo))
        lost += not is_saved(model, undo, before, after)
    return RANDOM_KILLS // 2, lost


def fresh(room: Path, name: str) -> tuple[Path, Path, Mapping[str, str], Mapping[str, str]]:
    """A model, the place of its undo file, and what it holds before and after a merge."""
    shutil.rmtree(room / name, ignore_errors=True)
    (room / name).mkdir()
    model, undo = room / name / "model", room / name / "model.undo"
    LAYOUTS[name](model, base_tensors())
    (model / "config.json").write_text("{}")
    before = digests(model)
    patched(model, undo)
    after = digests(model)
    unpatched(model, undo)
    return model, undo, before, after


LAYOUTS = {"one file": base, "shards": sharded}


def back_and_forth(model: Path, undo: Path) -> None:
    patched(model, undo)
    unpatched(model, undo)


def whole_time(model: Path, undo: Path) -> float:
    start = time.perf_counter()
    back_and_forth(model, undo)
    return time.perf_counter() - start


def killed_after(seconds: float, work: Callable[[], object]) -> None:
    wait_for_threads()
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def is_saved(model: Path, undo: Path, before: Mapping[str, str], after: Mapping[str, str]) -> bool:
    try:
        check_blind(model, dict(before), dict(after))
    except AssertionError:
        return False
    if undo.exists():
        unpatched(model, undo)
    return forgetful(digests(model)) == before


def into_a_directory(room: Path, shards: str) -> dict[str, tuple[int, int]]:
    """The same for `merge -o`: for every way to be stopped (strikes, those after which something was lost)."""
    base, adapter, out = *llama(room, "20KB" if shards == "shards" else "1GB"), room / "room" / "out"
    os.environ["PEFTSURGERY_CACHE"] = str(room / "kept")
    ps.merge(base, adapter, out=room / "whole")
    out.parent.mkdir()
    inputs, whole = digest(base) | digest(adapter), digest(room / "whole")
    job = partial(ps.merge, base, adapter, out=out)

    def lost() -> int:
        try:
            resume_checked(job, out.parent, whole)
            assert digest(base) | digest(adapter) == inputs
        except (AssertionError, SurgeryError):
            shutil.rmtree(out.parent)
            out.parent.mkdir()
            return 1
        return 0

    ways = {"kill": CHANGES, "torn": ("pwrite",), "interrupt": CHANGES}
    ways |= {str(errno.ENOSPC): CHANGES, str(errno.EIO): (*CHANGES, *READS)}
    found = {}
    for how, calls in ways.items():
        outcomes = [lost() for _ in points(job, how, calls)]
        found[f"-o, {shards}, every call, {NAMES.get(how, how)}"] = len(outcomes), sum(outcomes)
    start = time.perf_counter()
    struck(job, 0, "kill")
    span, chance = time.perf_counter() - start, random.Random(0)
    shutil.rmtree(out)
    outcomes = []
    for _ in range(RANDOM_KILLS):
        killed_after(chance.uniform(0, span), job)
        outcomes.append(lost())
    return {**found, f"-o, {shards}, random times": (len(outcomes), sum(outcomes))}


NAMES = {str(errno.ENOSPC): "disk full", str(errno.EIO): "disk fails"}


def llama(room: Path, most: str) -> tuple[Path, Path]:
    """A base in files of that size, and a LoRA for it."""
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            vocab_size=99,
        )
    )
    model.to(torch.bfloat16).save_pretrained(room / "base", max_shard_size=most)
    return room / "base", adapter_for(model, "q_proj,v_proj", room / "adapter")


def main() -> int:
    found = {}
    with tempfile.TemporaryDirectory(prefix="crash-", dir=MEMORY if MEMORY.is_dir() else None) as room:
        for name in LAYOUTS:
            for how in ("kill", "torn"):
                found[f"in place, {name}, every change, {how}"] = at_every_change(Path(room), name, how)
            found[f"in place, {name}, random times"] = at_random_times(Path(room), name)
        halfway.EVERY = 4000  # of a small file too there are notes
        for name in LAYOUTS:
            (Path(room) / f"-o {name}").mkdir()
            found |= into_a_directory(Path(room) / f"-o {name}", name)
    for name, (kills, lost) in found.items():
        print(f"{name:<40}{kills:5} strikes {lost:3} lost or corrupted something")
    kills, lost = (sum(pair[i] for pair in found.values()) for i in (0, 1))
    print(f"{kills} strikes, {lost} lost or corrupted something (bar: 0).")
    RESULTS.write_text(
        json.dumps({"kills": kills, "lost": lost, "of": found}, indent=2) + "\n", encoding="utf-8"
    )
    return 0 if lost == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
