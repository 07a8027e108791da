"""Wall time of a merge in place and of its undoing, against a durable copy of the same checkpoint.

python -m benchmarks.in_place [ROUNDS]

The checkpoint is Llama-shaped: 3.4 GB of random bf16 in four files, under the directory for temporary files. The
adapter is a LoRA of rank 16 on q_proj and v_proj. A copy is `cp -r` and `sync`; a merge in place leaves its undo
file and every patched byte flushed. They take turns, the page cache is warm, and the import of the libraries is
not counted. Every undoing is checked by the SHA-256 of every file.
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
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import peftsurgery as ps

CONFIG = LlamaConfig(
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=24,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    tie_word_embeddings=True,
    architectures=["LlamaForCausalLM"],
    dtype="bfloat16",
)
FILES, BAR = 4, 0.4
RESULTS = Path(__file__).parent / "results" / "in_place.json"


def write_model(path: Path) -> torch.nn.Module:
    """Random weights in files of about the same size; the model on the meta device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16)
    path.mkdir()
    CONFIG.save_pretrained(path)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    places, names = {}, list(shapes)
    for number in range(FILES):
        file = f"model-{number + 1:05}-of-{FILES:05}.safetensors"
        held = names[number * len(names) // FILES : (number + 1) * len(names) // FILES]
        save_file({name: randomly(shapes[name]) for name in held}, path / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(held, file))
    index = {"metadata": {}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return model


def randomly(shape: torch.Size) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02)


def write_adapter(model: torch.nn.Module, path: Path) -> None:
    adapter = ps.remove(ps.inject(model, ps.LoRA(r=16, lora_alpha=32), "q_proj,v_proj"))
    params = {
        site: {name: torch.randn(p.shape) * 0.02 for name, p in held.items()}
        for site, held in adapter.params.items()
    }
    ps.save_adapter(ps.Adapter(adapter.plan, params), path)


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
    model, adapter, undo, out = (room / name for name in ("model", "adapter", "model.undo", "copy"))
    write_adapter(write_model(model), adapter)
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
