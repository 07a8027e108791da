"""Memory, bytes and time of exporting a decoder by reference, beside the exporters that load the model.

python -m benchmarks.export_memory [--gigabytes 3.6] [--dtype bfloat16] [--peers]

The checkpoint has Llama-7B's layers, as many as fill the gigabytes, in shards, and is sparse: its files have their
length and no blocks, so it costs no disk and reads as zeros. A LoRA of rank 16 is on two matrices of every layer. Each
export runs in a process of its own and is not compared with torch, for that would load the weights. What counts is
the largest resident set of the process (with the imports of torch, transformers and onnx), the bytes that its
directory holds beside the links, and the time. ONNX Runtime then loads the graph in another process, with prepacking
off, which would copy every matrix.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.checkpoints import adapter

SHARD = 1_000_000_000
WIDTH, HEADS, INNER, VOCABULARY = 4096, 32, 11008, 32000
"""Llama-7B's."""
RESULTS = Path(__file__).parent / "results" / "export_memory.json"
WORDS = {torch.float32: "F32", torch.bfloat16: "BF16"}
PEAK = """
def resident(word):
    # getrusage would count the parent's memory from before the process became this one
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(word))
"""
EXPORT = """
import sys, time
start = time.perf_counter()
import peftsurgery as ps
ps.export_onnx(sys.argv[1], out=sys.argv[2], weights=sys.argv[3], adapters=sys.argv[4:], verify=False)
print(resident("VmHWM"), time.perf_counter() - start)
"""
STOCK = """
import sys, time, pathlib, torch
from transformers import AutoModelForCausalLM
start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval()
class Plain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = model
    def forward(self, ids, mask):
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
out = pathlib.Path(sys.argv[2])
out.mkdir()
ids, mask = torch.ones(2, 11, dtype=torch.int64), torch.ones(2, 11, dtype=torch.int64)
mask[1, :3] = 0
free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
torch.onnx.export(Plain(), (ids, mask), out / "model.onnx", dynamo=True, dynamic_shapes=(free, free), verbose=False)
print(resident("VmHWM"), time.perf_counter() - start)
"""
TRANSFORMERS = """
import sys, time, pathlib, torch
from transformers import AutoModelForCausalLM
from transformers.exporters import OnnxConfig, OnnxExporter
start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval()
out = pathlib.Path(sys.argv[2])
out.mkdir()
ids, mask = torch.ones(2, 11, dtype=torch.int64), torch.ones(2, 11, dtype=torch.int64)
mask[1, :3] = 0
feeds = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
done = OnnxExporter().export(model, feeds, OnnxConfig(dynamic=True))
done.save_pretrained(out)
print(resident("VmHWM"), time.perf_counter() - start)
"""
PEERS = {"torch.onnx.export": STOCK, "transformers' exporter": TRANSFORMERS}
MERGED = "reference, LoRA merged"
TARGETS = ("self_attn.q_proj", "self_attn.o_proj")
"""What the LoRA is on: matrices of WIDTH × WIDTH."""
IMPORTS = """
import onnx, onnx_ir, onnxscript, torch, transformers, peftsurgery as ps
import torch.onnx._internal.exporter._core
from transformers import LlamaForCausalLM
ps.export_onnx
print(resident("VmHWM"), 0)
"""
LOAD = """
import sys, time
import onnxruntime
before = resident("VmRSS")
options = onnxruntime.SessionOptions()
options.add_session_config_entry("session.disable_prepacking", "1")
start = time.perf_counter()
session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx", options, providers=["CPUExecutionProvider"])
print(resident("VmRSS") - before, time.perf_counter() - start)
"""


def config(nbytes: float, dtype: torch.dtype) -> LlamaConfig:
    """A Llama of as many layers as fill `nbytes`."""
    a_layer = (4 * WIDTH * WIDTH + 3 * WIDTH * INNER) * dtype.itemsize
    tables = 2 * VOCABULARY * WIDTH * dtype.itemsize
    said = LlamaConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        vocab_size=VOCABULARY,
        num_hidden_layers=max(1, round((nbytes - tables) / a_layer)),
    )
    said.dtype, said.architectures = dtype, ["LlamaForCausalLM"]
    return said


def write(directory: Path, said: LlamaConfig, dtype: torch.dtype) -> int:
    """The checkpoint, every tensor zeros that lie nowhere; its length comes back."""
    with torch.device("meta"):
        model = LlamaForCausalLM(said)
    said.save_pretrained(directory)
    named, total = dict[str, str](), 0
    for number, shard in enumerate(shards(model, dtype), start=1):
        file = directory / f"model-{number:05}.safetensors"
        total += sparse(file, shard, dtype)
        named.update(dict.fromkeys(shard, file.name))
    index = {"metadata": {"total_size": total}, "weight_map": named}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def shards(model: nn.Module, dtype: torch.dtype) -> Iterator[dict[str, torch.Size]]:
    """Names and shapes, a file's worth at a time."""
    held, nbytes = dict[str, torch.Size](), 0
    for name, parameter in model.named_parameters():
        if held and nbytes + parameter.numel() * dtype.itemsize > SHARD:
            yield held
            held, nbytes = {}, 0
        held[name] = parameter.shape
        nbytes += parameter.numel() * dtype.itemsize
    yield held


def sparse(file: Path, shapes: dict[str, torch.Size], dtype: torch.dtype) -> int:
    """A safetensors file with a true header and a hole behind it."""
    header, reached = dict[str, Any](), 0
    for name, shape in shapes.items():
        end = reached + shape.numel() * dtype.itemsize
        header[name] = {"dtype": WORDS[dtype], "shape": list(shape), "data_offsets": [reached, end]}
        reached = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        handle.truncate(8 + len(text) + reached)
    return reached


def measured(code: str, *words: object) -> tuple[float, float]:
    """What a process of its own says: bytes, seconds."""
    command = [sys.executable, "-c", PEAK + code, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    nbytes, seconds = done.stdout.split()[-2:]
    return float(nbytes), float(seconds)


def written(directory: Path) -> int:
    """Bytes of the files that are no second name of another."""
    stats = [file.stat() for file in directory.rglob("*") if file.is_file()]
    return sum(stat.st_size for stat in stats if stat.st_nlink == 1)


def row(base: Path, out: Path, way: str) -> dict[str, Any]:
    lora = [base.parent / "lora"] if way == MERGED else []
    peak, seconds = measured(PEERS.get(way, EXPORT), base, out, way.partition(",")[0], *lora)
    found = {"export": way, "peak_bytes": peak, "seconds": seconds, "written_bytes": written(out)}
    if way != "reference":
        shutil.rmtree(out)
    return found


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    words.add_argument("--gigabytes", type=float, default=3.6)
    words.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    words.add_argument(
        "--peers",
        action="store_true",
        help="measure what writes all weights too: copies, and the exporters that load the model",
    )
    asked = words.parse_args()
    dtype = getattr(torch, asked.dtype)
    with tempfile.TemporaryDirectory(prefix="export_memory-") as room:
        base = Path(room) / "base"
        base.mkdir()
        said = config(asked.gigabytes * 1e9, dtype)
        total = write(base, said, dtype)
        imports, _ = measured(IMPORTS)
        adapter(Path(room) / "lora", TARGETS, said.num_hidden_layers)
        ways = ["reference", MERGED, *(("copy", *PEERS) if asked.peers else ())]
        rows = [row(base, Path(room) / f"out-{number}", way) for number, way in enumerate(ways)]
        loaded = measured(LOAD, Path(room) / "out-0") if dtype is torch.float32 else None
    found = {
        "checkpoint_bytes": total,
        "layers": said.num_hidden_layers,
        "dtype": asked.dtype,
        "cpus": os.cpu_count(),
        "imports_bytes": imports,
        "exports": rows,
        "session": None if loaded is None else {"resident_bytes": loaded[0], "seconds": loaded[1]},
    }
    key = f"{asked.gigabytes:g} GB {asked.dtype}"
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    RESULTS.write_text(json.dumps({**known, key: found}, indent=2) + "\n")
    show(found)


def show(found: dict[str, Any]) -> None:
    console = Console()
    total = found["checkpoint_bytes"]
    table = Table(title=f"{total / 1e9:.1f} GB {found['dtype']}, {found['layers']} layers")
    for column in ("export", "peak MB", "written MB", "of the checkpoint", "s"):
        table.add_column(column, justify="right")
    for entry in found["exports"]:
        share = entry["written_bytes"] / total
        cells = (entry["peak_bytes"] / 1e6, entry["written_bytes"] / 1e6)
        table.add_row(
            entry["export"], f"{cells[0]:.0f}", f"{cells[1]:.2f}", f"{share:.3%}", f"{entry['seconds']:.1f}"
        )
    console.print(table)
    console.print(f"Of the peak, imports take {found['imports_bytes'] / 1e6:.0f} MB.")
    if found["session"] is not None:
        mb, seconds = found["session"]["resident_bytes"] / 1e6, found["session"]["seconds"]
        console.print(f"ONNX Runtime loads it in {seconds:.2f} s and {mb:.0f} MB, weights not touched yet.")


if __name__ == "__main__":
    main()
