"""Wall time of a merge in place and of its undoing, against a durable copy of the same checkpoint.

python -m benchmarks.in_place [ROUNDS]

The checkpoint is Llama-shaped, 3.6 GB of random bf16 in four files, under the directory for temporary files; the
adapter is a LoRA of rank 16 on q_proj and v_proj (benchmarks.checkpoints makes both). A copy is `cp -r` and `sync`;
a merge in place leaves its undo file and every patched byte flushed. They take turns, the page cache is warm, and
the import of the libraries is not counted. Every undoing is checked by the SHA-256 of every file.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

import peftsurgery as ps
from benchmarks.checkpoints import build

GIGABYTES, BAR = 3.6, 0.4
RESULTS = Path(__file__).parent / "results" / "in_place.json"


def digests(path: Path) -> dict[str, str]:
    found = {}
    for file in sorted(path.iterdir()):
        with file.open("rb") as handle:
            found[file.name] = hashlib.file_digest(handle, "sha256").hexdigest()
    return found


def seconds(work: Callable[[], object]) -> float:
    os.sync()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def copied(model: Path, out: Path) -> None:
    subprocess.run(["cp", "-r", model, out], check=True)
    os.sync()


def race(room: Path, rounds: int) -> dict[str, list[float]]:
    """Each in turn; the first turn warms up and is not counted."""
    build(room, GIGABYTES)
    model, adapter, undo, out = (room / name for name in ("base", "q,v", "model.undo", "copy"))
    before, spent = digests(model), {"cp": [], "merge in place": [], "unmerge": []}
    for _ in range(rounds + 1):
        spent["cp"].append(seconds(lambda: copied(model, out)))
        shutil.rmtree(out)
        merge = seconds(lambda: ps.merge(model, adapter, in_place=True, undo=undo))
        spent["merge in place"].append(merge)
        spent["unmerge"].append(seconds(lambda: ps.unmerge(model, undo=undo)))
        assert digests(model) == before, "unmerge did not restore the bytes"
        undo.unlink()
    return {name: [round(time, 3) for time in times[1:]] for name, times in spent.items()}


def main() -> int:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory(prefix="in-place-") as room:
        spent = race(Path(room), rounds)
    middle = {name: median(times) for name, times in spent.items()}
    ratio = middle["merge in place"] / middle["cp"]
    for name, value in middle.items():
        print(f"{name:<16}{value:6.2f} s")
    print(f"A merge in place takes {ratio:.2f} of a durable copy (bar: {BAR}).")
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    found = {"machine": machine, "torch": torch.__version__, "seconds": spent, "median": middle}
    RESULTS.write_text(json.dumps({**found, "ratio": ratio, "bar": BAR}, indent=2) + "\n", encoding="utf-8")
    return 0 if ratio <= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
