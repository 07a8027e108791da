"""CPU time of putting LoRA into a model: ours against PEFT's, and how ours grows with the number of sites.

python -m benchmarks.injection

Every timing takes a fresh model on the meta device, where no weight is allocated, and is this process's CPU
time; the median counts. PEFT runs with `low_cpu_mem_usage=True`, its fastest way. They take turns. Python's
garbage collector walks every live object again and again while many are made, so the growth is shown with it
and without it.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import peftsurgery as ps

TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
RANK = 16
ROUNDS, ROUNDS_OF_SIZES = 9, 3
SIZES = (224, 1024, 4096, 8192)
BAR = 8.0
Inject = Callable[[nn.Module, str], nn.Module]
Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results" / "injection.json"


def llama_8b() -> nn.Module:
    """Llama 3 8B: 32 layers of 7 linear maps."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def many(count: int) -> nn.Module:
    """`count` linear maps, 8 to a block."""
    with torch.device("meta"):
        blocks = [nn.ModuleDict({f"map{i}": nn.Linear(64, 64) for i in range(8)}) for _ in range(count // 8)]
    return nn.ModuleDict({"blocks": nn.ModuleList(blocks)})


def ours(model: nn.Module, targets: str) -> nn.Module:
    return ps.inject(model, ps.LoRA(r=RANK), targets=targets)


def theirs(model: nn.Module, targets: str) -> nn.Module:
    config = LoraConfig(r=RANK, target_modules=targets.split(","))
    return get_peft_model(model, config, low_cpu_mem_usage=True)


def ours_uncollected(model: nn.Module, targets: str) -> nn.Module:
    gc.disable()
    try:
        return ours(model, targets)
    finally:
        gc.enable()


WAYS = {"ours": ours, "ours, gc off": ours_uncollected, "PEFT": theirs}


def seconds(build: Callable[[], nn.Module], inject: Inject, targets: str, expected: int) -> float:
    """CPU seconds of one injection into a fresh model, which must end with `expected` LoRA sites."""
    model = build()
    gc.collect()
    start = time.process_time()
    model = inject(model, targets)
    spent = time.process_time() - start
    sites = sum("lora_A" in name for name, p in model.named_parameters() if p.requires_grad)
    assert sites == expected, f"{inject.__name__} reached {sites} of {expected} sites"
    return spent


def race(build: Callable[[], nn.Module], targets: str, sites: int, rounds: int) -> Row:
    """Each way in turn; the first turn warms up and is not counted."""
    spent: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds + 1):
        for way, inject in WAYS.items():
            spent[way].append(seconds(build, inject, targets, sites))
    counted = {way: [round(time, 5) for time in times[1:]] for way, times in spent.items()}
    middle = {way: median(times) for way, times in counted.items()}
    return {"sites": sites, "median": middle, "all": counted, "ratio": middle["PEFT"] / middle["ours"]}


def per_site(row: Row, way: str) -> float:
    return float(row["median"][way] / row["sites"])


def shown(rows: dict[str, Row]) -> Table:
    table = Table("model", "sites", *WAYS, "ratio", title="CPU time, and of it per site")
    for name, row in rows.items():
        times = [f"{1e3 * row['median'][way]:7.1f} ms {1e6 * per_site(row, way):4.0f} µs" for way in WAYS]
        table.add_row(name, str(row["sites"]), *times, f"{row['ratio']:.1f}×")
    return table


def setting() -> dict[str, str]:
    names = ("torch", "transformers", "peft", "peftsurgery")
    return {name: version(name) for name in names} | {
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, 1 thread",
    }


def main() -> int:
    torch.set_num_threads(1)
    rows = {"Llama 3 8B": race(llama_8b, TARGETS, 224, ROUNDS)}
    maps = ",".join(f"map{i}" for i in range(8))
    for size in SIZES:
        rows[f"{size} linear maps"] = race(lambda size=size: many(size), maps, size, ROUNDS_OF_SIZES)
    Console(width=110).print(shown(rows))
    small, large = (rows[f"{size} linear maps"] for size in (SIZES[0], SIZES[-1]))
    growth = {way: round(per_site(large, way) / per_site(small, way), 2) for way in WAYS}
    ratio = rows["Llama 3 8B"]["ratio"]
    print(f"Llama 3 8B: {ratio:.1f} times less CPU time than PEFT (bar: {BAR:.0f}).")
    print(f"Cost of a site among {SIZES[-1]}, in sites among {SIZES[0]} (linear: 1): {growth}")
    RESULTS.parent.mkdir(exist_ok=True)
    found = {"setting": setting(), "seconds": rows, "ratio": ratio, "bar": BAR, "growth_per_site": growth}
    RESULTS.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0 if ratio >= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
