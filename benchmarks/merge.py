"""Merging a checkpoint on disk: ours against a durable copy of it, and against PEFT.

python -m benchmarks.merge [--gigabytes 3.6] [--runs 5] [--room DIRECTORY]

A Llama-shaped bf16 checkpoint with random weights lies in four files; two LoRA adapters of rank 16 are merged into it,
one on q_proj and v_proj, one on every linear map. All take turns, each in a process of its own, with the base in the
page cache and everything on the disk (`sync`) before the clock stops; the median counts. What the interpreter and
`import torch` take is measured by itself and taken off. Ours is the command `peftsurgery merge`, whole; its first run
into a base also asks transformers about it and is shown by itself. PEFT loads, merges and saves with safetensors.
axolotl, which goes through the checkpoint file by file, takes part when `make bench-peers` has set it up.

Then every tensor is compared with PEFT's, ours is written again with other blocks, tiles and threads, and the share of
elements that are not the correctly rounded result is counted in float64.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results" / "merge.json"
BARS = {"q,v": {"cp": 1.0, "peft": 5.0}, "all-linear": {"cp": 1.2, "peft": 8.0}}
PEAK = 400e6
PEFT = """
import sys, torch, transformers, peft
base = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
tuned = peft.PeftModel.from_pretrained(base, sys.argv[2])
tuned.merge_and_unload().save_pretrained(sys.argv[3])
"""
PEERS = Path(__file__).parents[1] / "build" / "peers"
AXOLOTL = """
import sys
from axolotl.cli.utils.lora_merge import merge_lora_sharded_efficient
merge_lora_sharded_efficient(*sys.argv[1:4])
"""


@dataclass(frozen=True)
class Run:
    """What a process took: seconds of wall clock and of CPU, bytes of memory at most, bytes read from the disk."""

    wall: float
    cpu: float
    peak: int
    read: int


def timed(*command: str | Path) -> Run:
    """Run it, and bring what it wrote to the disk."""
    begun = time.perf_counter()
    child = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    os.sync()
    wall = time.perf_counter() - begun
    if child.returncode:
        raise SystemExit(f"This failed: {command}")
    return Run(wall, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, used.ru_inblock * 512)


def contestants(room: Path) -> dict[str, tuple[str | Path, ...]]:
    """What takes turns; what each writes is in `room/out`."""
    base, out, python = room / "base", room / "out", sys.executable
    found: dict[str, tuple[str | Path, ...]] = {
        "cp": ("cp", "-r", base, out),
        "import torch": (python, "-c", "import torch"),
    }
    for name in BARS:
        found[f"ours {name}"] = ours(room, name, out)
        found[f"PEFT {name}"] = (python, "-c", PEFT, base, room / name, out)
        if PEERS.is_dir():
            words = ("env", f"PYTHONPATH={PEERS}", "AXOLOTL_DO_NOT_TRACK=1", python, "-c", AXOLOTL)
            found[f"axolotl {name}"] = (*words, base, room / name, out)
    return found


def ours(room: Path, name: str, out: Path) -> tuple[str | Path, ...]:
    return (sys.executable, "-m", "peftsurgery", "merge", room / "base", room / name, "-o", out, "--quiet")


def race(room: Path, rounds: int) -> dict[str, list[Run]]:
    turns = [(f"ours {name}, first time", ours(room, name, room / "out")) for name in BARS]
    for _ in range(rounds):
        turns += contestants(room).items()
    runs: dict[str, list[Run]] = defaultdict(list)
    for name, command in turns:
        shutil.rmtree(room / "out", ignore_errors=True)
        if "first time" in name:
            shutil.rmtree(room / "kept", ignore_errors=True)
        for file in (room / "base").iterdir():
            warm(file)
        os.sync()
        time.sleep(1)
        runs[name].append(timed(*command))
        if name.startswith("PEFT"):
            shutil.rmtree(room / name, ignore_errors=True)
            (room / "out").rename(room / name)
    shutil.rmtree(room / "out", ignore_errors=True)
    return runs


def warm(file: Path) -> None:
    with file.open("rb") as handle:
        while handle.read(1 << 24):
            pass


def bits(room: Path, name: str) -> Any:
    """What `benchmarks.merge_bits` says; in a process of its own, for what this one holds counts as its children's."""
    words = [sys.executable, "-m", "benchmarks.merge_bits", room, name]
    return json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)


def summary(runs: Mapping[str, list[Run]]) -> dict[str, dict[str, float]]:
    return {
        name: {
            "wall": median(run.wall for run in found),
            "fastest": min(run.wall for run in found),
            "slowest": max(run.wall for run in found),
            "cpu": median(run.cpu for run in found),
            "peak_mb": max(run.peak for run in found) / 1e6,
        }
        for name, found in runs.items()
    }


def verdict(runs: Mapping[str, list[Run]]) -> list[dict[str, Any]]:
    """For each adapter the ratios that count, beside what they may be."""
    of = summary(runs)
    copy, torched = of["cp"]["wall"], of["import torch"]["wall"]
    rows = []
    for name, bars in BARS.items():
        mine, theirs = of[f"ours {name}"], of[f"PEFT {name}"]
        rows.append(
            {
                "adapter": name,
                "over cp": (mine["wall"] - torched) / copy,
                "at most": bars["cp"],
                "over cp, first time": (of[f"ours {name}, first time"]["wall"] - torched) / copy,
                "over cp, whole process": mine["wall"] / copy,
                "PEFT over ours": (theirs["wall"] - torched) / (mine["wall"] - torched),
                "at least": bars["peft"],
                "PEFT over ours, whole processes": theirs["wall"] / mine["wall"],
                **streaming(of, name),
                "peak MB": mine["peak_mb"],
                "peak MB, at most": PEAK / 1e6,
            }
        )
    return rows


def streaming(of: Mapping[str, Mapping[str, float]], name: str) -> dict[str, float]:
    """What the best peer that goes through the checkpoint file by file takes over ours, where it takes part."""
    mine, theirs = of[f"ours {name}"], of.get(f"axolotl {name}")
    if theirs is None:
        return {}
    return {f"axolotl over ours, {what}": theirs[what] / mine[what] for what in ("wall", "cpu", "peak_mb")}


def show(results: Mapping[str, Any]) -> None:
    console = Console()
    table = Table("process", "wall s", "(fastest, slowest)", "CPU s", "peak MB")
    for name, row in results["processes"].items():
        spread = f"({row['fastest']:.2f}, {row['slowest']:.2f})"
        table.add_row(name, f"{row['wall']:.2f}", spread, f"{row['cpu']:.2f}", f"{row['peak_mb']:.0f}")
    console.print(table)
    for row in results["verdict"]:
        console.print(
            {key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()}
        )
    for name, row in results["fidelity"].items():
        console.print(name, row, f"{row['off'] / row['of']:.2e} off the correctly rounded float64 result")


def main() -> int:
    words = argparse.ArgumentParser(description="Merging a checkpoint on disk.")
    words.add_argument("--gigabytes", type=float, default=3.6, help="size of the base")
    words.add_argument("--runs", type=int, default=5, help="runs of each, whose median counts")
    words.add_argument(
        "--room", type=Path, help="a directory on the disk to measure, with four times that room"
    )
    said = words.parse_args()
    if not PEERS.is_dir():
        print("axolotl does not take part: `make bench-peers` sets it up.")
    with tempfile.TemporaryDirectory(dir=said.room, prefix="merge-bench-") as folder:
        room = Path(folder)
        os.environ["PEFTSURGERY_CACHE"] = str(room / "kept")
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package is compiled once
        subprocess.run(
            [sys.executable, "-m", "benchmarks.checkpoints", room, str(said.gigabytes)], check=True
        )
        size = sum(file.stat().st_size for file in (room / "base").glob("*.safetensors"))
        runs = race(room, said.runs)
        exact = {name: bits(room, name) for name in BARS}
    results = {
        "machine": {
            "cores": os.cpu_count(),
            "system": platform.platform(),
            "python": platform.python_version(),
        },
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "safetensors")},
        "gigabytes": size / 1e9,
        "runs": said.runs,
        "processes": summary(runs),
        "verdict": verdict(runs),
        "fidelity": exact,
    }
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    show(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
