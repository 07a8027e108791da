"""Many adapters merged into one base: in one command, against as many merges and as many durable copies.

python -m benchmarks.fleet [--adapters 10] [--runs 3] [--room DIRECTORY]

A Llama-shaped bf16 base of 1.2 GB lies in two files; every adapter is a LoRA of rank 16 on q_proj and v_proj. All take
turns, whole processes, with everything on the disk (`sync`) before the clock stops, and the base out of the page cache
when it starts; the median counts. What is on the disk is counted by blocks, a file with several names once.

How often the base is read where it does not fit into the page cache is measured by throwing each of its files out of
the cache when the next is read: with one model at a time, and with all of them together, as a fleet is merged. What
Ray's processes read and compute is not counted, since they are not this one's children.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.merge import Run, timed

RESULTS = Path(__file__).parent / "results" / "fleet.json"
FILES = 2
FORGETFUL = """
import sys
from pathlib import Path
import peftsurgery as ps
from benchmarks.fleet import evict
from peftsurgery.commands import fleet
from peftsurgery.disk.checkpoint import open_checkpoint
fleet.TOGETHER = int(sys.argv[4])
place = {name: stored.file for name, stored in open_checkpoint(Path(sys.argv[1])).tensors.items()}
held = set()
def forget(event):
    if event.verb == "write" and place[event.name] not in held:
        for file in held:
            evict(file)
        held.clear()
        held.add(place[event.name])
ps.merge(sys.argv[1], adapters_from=sys.argv[2], out=sys.argv[3], listen=forget)
"""
"""A merge whose page cache holds one file of the base, the one that is read."""
MAKE = """
import sys
from pathlib import Path
from benchmarks.checkpoints import ADAPTERS, adapter, build
room = Path(sys.argv[1])
layers = build(room, 1.2, int(sys.argv[2]))
(room / "adapters").mkdir()
for seed, name in enumerate(sys.argv[3:]):
    adapter(room / "adapters" / name, ADAPTERS["q,v"], layers, seed)
"""
"""In a process of its own, for what this one holds counts as its children's."""
COLUMNS = {
    "wall": "wall s",
    "cpu": "CPU s",
    "peak_mb": "peak MB",
    "read_gb": "read GB",
    "disk_gb": "on disk GB",
}
UNSEEN = ("cpu", "peak_mb", "read_gb")
Command = Sequence[str | Path]


def evict(file: Path) -> None:
    """Throw a file out of the page cache."""
    descriptor = os.open(file, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def contestants(room: Path, names: Sequence[str]) -> dict[str, list[Command]]:
    """What takes turns: each is some processes, one after the other, which write below `room/out`."""
    base, room_of, out = room / "base", room / "adapters", room / "out"
    ours: Command = (sys.executable, "-m", "peftsurgery", "merge", base, "--quiet")
    fleet: Command = (*ours, "--adapters-from", room_of, "-o", out)
    forgetful: Command = (sys.executable, "-c", FORGETFUL, base, room_of, out)
    found: dict[str, list[Command]] = {
        "copies": [("cp", "-r", base, out / name) for name in names],
        "merges, one by one": [(*ours, room_of / name, "-o", out / name) for name in names],
        "fleet": [fleet],
        "fleet, shared": [(*fleet, "--share-untouched")],
        "fleet, small cache, one at a time": [(*forgetful, "1")],
        "fleet, small cache, together": [(*forgetful, "16")],
    }
    if importlib.util.find_spec("ray"):
        found["fleet, shared, on Ray"] = [(*fleet, "--share-untouched", "--engine", "ray")]
        found["fleet, on Ray"] = [(*fleet, "--engine", "ray")]
    return found


def on_disk(path: Path) -> int:
    """Bytes of the blocks below a directory, every file counted once."""
    found = {stat.st_ino: stat.st_blocks * 512 for file in path.rglob("*") if (stat := file.stat())}
    return sum(found.values())


def turn(room: Path, commands: Sequence[Command]) -> dict[str, float]:
    shutil.rmtree(room / "out", ignore_errors=True)
    (room / "out").mkdir()
    os.sync()
    for file in (room / "base").iterdir():
        evict(file)
    runs: list[Run] = [timed(*command) for command in commands]
    return {
        "wall": sum(run.wall for run in runs),
        "cpu": sum(run.cpu for run in runs),
        "peak_mb": max(run.peak for run in runs) / 1e6,
        "read_gb": sum(run.read for run in runs) / 1e9,
        "disk_gb": on_disk(room / "out") / 1e9,
    }


def race(room: Path, names: Sequence[str], rounds: int) -> dict[str, dict[str, float]]:
    turns: dict[str, list[dict[str, float]]] = defaultdict(list)
    for _ in range(rounds):
        for name, commands in contestants(room, names).items():
            turns[name].append(turn(room, commands))
    return {name: middle(found, UNSEEN if "on Ray" in name else ()) for name, found in turns.items()}


def middle(turns: Sequence[Mapping[str, float]], unseen: Sequence[str]) -> dict[str, float]:
    return {what: median(one[what] for one in turns) for what in turns[0] if what not in unseen}


def show(results: Mapping[str, Any]) -> None:
    table = Table(f"{results['adapters']} models", *COLUMNS.values())
    for name, row in results["processes"].items():
        table.add_row(name, *(f"{row[what]:.2f}" if what in row else "" for what in COLUMNS))
    Console().print(table)


def main() -> int:
    words = argparse.ArgumentParser(description="Many adapters merged into one base.")
    words.add_argument("--adapters", type=int, default=10, help="how many")
    words.add_argument("--runs", type=int, default=3, help="runs of each, whose median counts")
    words.add_argument("--room", type=Path, help="a directory on the disk to measure")
    said = words.parse_args()
    names = [f"adapter-{number:02}" for number in range(said.adapters)]
    with tempfile.TemporaryDirectory(dir=said.room, prefix="fleet-bench-") as folder:
        room = Path(folder)
        os.environ["PEFTSURGERY_CACHE"] = str(room / "kept")
        subprocess.run([sys.executable, "-c", MAKE, room, str(FILES), *names], check=True)
        size = sum(file.stat().st_size for file in (room / "base").glob("*.safetensors"))
        found = race(room, names, said.runs)
    machine = {"cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()}
    results = {"machine": machine, "gigabytes": size / 1e9, "adapters": said.adapters, "runs": said.runs}
    RESULTS.write_text(json.dumps({**results, "processes": found}, indent=2) + "\n")
    show({**results, "processes": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
