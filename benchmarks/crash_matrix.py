"""How many kills a merge in place and its undoing survive: at every change of the disk, and at random times.

python -m benchmarks.crash_matrix

The work runs in a forked child on a small checkpoint. It is killed (SIGKILL) before every call that changes the
disk, and with that call half done; and at a hundred random times. After each, what is neither the old nor the new
model must have no `config.json`, and `unmerge` must give every file the SHA-256 that it had.
"""

from __future__ import annotations

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

from tests.strike import points
from tests.units.test_disk_merge import base, base_tensors, sharded
from tests.units.test_in_place import check_blind, digests, forgetful, patched, unpatched

RESULTS = Path(__file__).parent / "results" / "crash_matrix.json"
RANDOM_KILLS = 100
Work = Callable[[Path, Path], None]


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
        killed_after(chance.uniform(0, span), back_and_forth, model, undo)
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


def killed_after(seconds: float, work: Work, model: Path, undo: Path) -> None:
    child = os.fork()
    if child == 0:
        try:
            work(model, undo)
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


def main() -> int:
    found = {}
    with tempfile.TemporaryDirectory(prefix="crash-") as room:
        for name in LAYOUTS:
            for how in ("kill", "torn"):
                found[f"{name}, every change, {how}"] = at_every_change(Path(room), name, how)
            found[f"{name}, random times"] = at_random_times(Path(room), name)
    for name, (kills, lost) in found.items():
        print(f"{name:<32}{kills:5} kills {lost:3} lost or corrupted something")
    kills, lost = (sum(pair[i] for pair in found.values()) for i in (0, 1))
    print(f"{kills} kills, {lost} lost or corrupted something (bar: 0).")
    RESULTS.write_text(
        json.dumps({"kills": kills, "lost": lost, "of": found}, indent=2) + "\n", encoding="utf-8"
    )
    return 0 if lost == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
