"""Exports on a CUDA machine: where their nodes really run, whether they are right in float16, and how fast they are.

python -m benchmarks.gpu              on a CUDA machine, everything; without one, where the nodes would run
python -m benchmarks.gpu --dry-run    every step on the CPU, on small shapes

Speeds are ratios to torch in the same run: eager and compiled, the same weights in the same dtype, batch 1, greedy.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import peftsurgery as ps
from fixtures.minilm import minilm_path
from peftsurgery.graph.generation import Decoder
from peftsurgery.graph.sampling import Sampling
from peftsurgery.graph.session import CPU, CUDA, Session

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
STORIES = ROOT / "fixtures" / "stories260k"
LARGE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8}
PROMPT = 32
"""Tokens that a text begins with."""


@dataclass(frozen=True)
class Setting:
    """What is run on.

    Args:
        device: torch's word; ONNX Runtime's provider follows it.
        small: a dry run.
    """

    device: str
    small: bool

    @property
    def provider(self) -> str:
        return "cuda" if self.device == "cuda" else "cpu"

    @property
    def tokens(self) -> int:
        return 8 if self.small else 128

    @property
    def rounds(self) -> int:
        return 2 if self.small else 5


def large(room: Path, small: bool) -> Path:
    """A checkpoint of Llama's shape, about a billion random parameters in float16."""
    shape = SMALL if small else LARGE
    said = LlamaConfig(vocab_size=32000, num_key_value_heads=4, max_position_embeddings=2048, **shape)
    torch.manual_seed(0)
    LlamaForCausalLM(said).half().save_pretrained(room / "llama")
    return room / "llama"


def exported(model: Path, out: Path, verify: bool) -> dict[str, Any]:
    """The export in float16 for CUDA, or why there is none."""
    report = ps.export_onnx(
        model, out=out, dtype="float16", target="cuda", check_placement="cuda", verify=verify
    )
    parity = report.facts["parity"]
    return {
        "static": report.facts["placed"]["model.onnx"],
        "fused": report.facts["fused"],
        "parity": parity and {key: parity[key] for key in ("max_abs_diff", "tolerance", "provider", "kl")},
    }


def assigned(graph: Path, provider: str) -> dict[str, Any]:
    """Where ONNX Runtime has really put each node, by its own record."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if provider == CUDA:
        ort.preload_dlls()
    session = ort.InferenceSession(str(graph), options, providers=[provider, CPU][: 1 + (provider != CPU)])
    parts = session.get_provider_graph_assignment_info()
    found = [(part.ep_name, node.op_type) for part in parts for node in part.get_nodes()]
    return {
        "nodes": dict(Counter(where for where, _ in found)),
        "on_cpu": dict(Counter(op for where, op in found if where == CPU)),
    }


def seconds(call: Callable[[], object], setting: Setting) -> float:
    """The median of some calls, the first two apart: they compile, allocate and choose kernels."""
    taken = []
    for number in range(setting.rounds + 2):
        start = time.perf_counter()
        call()
        if setting.device == "cuda":
            torch.cuda.synchronize()
        if number > 1:
            taken.append(time.perf_counter() - start)
    return float(np.median(taken))


def attempted(call: Callable[[], Any]) -> Any:
    """What a step gives, or what went wrong: one that fails leaves the others their numbers."""
    try:
        return call()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]}


def writing(model: Path, out: Path, setting: Setting) -> dict[str, Any]:
    """Tokens a second, of ONNX Runtime, torch and torch.compile; each writes the same number of tokens."""
    ids = torch.arange(3, 3 + PROMPT)[None].to(setting.device)
    dtype = torch.float16 if setting.device == "cuda" else torch.float32
    live = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(setting.device).eval()
    live.generation_config.eos_token_id = None
    words = {"max_new_tokens": setting.tokens, "do_sample": False, "pad_token_id": 0}
    decoder = Decoder(out, [setting.provider])

    def ours() -> object:
        return [*decoder.steps(ids.cpu().tolist(), Sampling(setting.tokens))]

    def eager() -> object:
        return live.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **words)

    found = {"onnxruntime": attempted(lambda: setting.tokens / seconds(ours, setting))}
    with torch.inference_mode():
        found["torch"] = attempted(lambda: setting.tokens / seconds(eager, setting))
        words["cache_implementation"] = "static"
        live.forward = torch.compile(live.forward)
        found["torch.compile"] = attempted(lambda: setting.tokens / seconds(eager, setting))
    return found


def reading(model: Path, out: Path, setting: Setting) -> dict[str, Any]:
    """Batches a second of an encoder, 8 texts of 128 tokens."""
    rows, length = (2, 16) if setting.small else (8, 128)
    ids = torch.randint(1000, 2000, (rows, length), device=setting.device)
    feeds = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
    }
    dtype = torch.float16 if setting.device == "cuda" else torch.float32
    live = AutoModel.from_pretrained(model, dtype=dtype).to(setting.device).eval()
    session = Session(out / "model.onnx", [setting.provider])
    arrays = {name: tensor.cpu().numpy() for name, tensor in feeds.items()}
    found = {"onnxruntime": attempted(lambda: 1 / seconds(lambda: session.run(arrays), setting))}
    if setting.provider == "cuda":
        found["CUDA graph"] = attempted(lambda: 1 / seconds(replaying(out, arrays), setting))
    with torch.inference_mode():
        found["torch"] = attempted(lambda: 1 / seconds(lambda: live(**feeds), setting))
        compiled = torch.compile(live)
        found["torch.compile"] = attempted(lambda: 1 / seconds(lambda: compiled(**feeds), setting))
    return found


def replaying(out: Path, arrays: Mapping[str, Any]) -> Callable[[], object]:
    """A run of an encoder that CUDA replays as one graph."""
    session = Session(out / "model.onnx", ["cuda"], cuda_graph=True)
    return lambda: session.run(arrays)


def measured(name: str, model: Path, room: Path, setting: Setting | None) -> dict[str, Any]:
    """Everything about one model; without a setting, only where its nodes would run."""
    out = room / f"{name}-onnx"
    found = attempted(lambda: exported(model, out, verify=setting is not None))
    if setting is None or "failed" in found:
        return found
    run = reading if name == "minilm" else writing
    provider = CUDA if setting.provider == "cuda" else CPU
    found["assigned"] = attempted(lambda: assigned(out / "model.onnx", provider))
    found["per_second"] = attempted(lambda: run(model, out, setting))
    return found


def show(found: Mapping[str, Any]) -> None:
    table = Table(title=f"Exports for CUDA, float16: {found['device']}")
    for column in (
        "model",
        "on CUDA",
        "shapes",
        "lost",
        "fused",
        "off (allowed)",
        "ONNX Runtime",
        "CUDA graph",
        "torch",
        "compiled",
    ):
        table.add_column(column)
    for name, one in found["models"].items():
        static, parity, speed = one.get("static"), one.get("parity"), one.get("per_second") or {}
        if static is None:
            table.add_row(name, one["failed"])
            continue
        off = f"{parity['max_abs_diff']:.1e} ({parity['tolerance']:.1e})" if parity else "not run"
        rates = [speed.get(key, "not run") for key in ("onnxruntime", "CUDA graph", "torch", "torch.compile")]
        cells = [f"{rate:.1f}/s" if isinstance(rate, float) else str(rate) for rate in rates]
        counts = (str(static["device"]), str(static["shapes"]), str(len(static["lost"])))
        table.add_row(name, *counts, one["fused"], off, *cells)
    console = Console(width=180)
    console.print(table)
    for name, one in found["models"].items():
        if "assigned" in one:
            console.print(f"{name}: ONNX Runtime's own record: {json.dumps(one['assigned'])}")
    if found.get("missing"):
        console.print(found["missing"])


def chosen(dry: bool) -> tuple[Setting | None, str]:
    """What can be run here, and why not more."""
    if dry:
        return Setting("cpu", small=True), "A dry run on the CPU: the speeds say nothing."
    if CUDA not in ort.get_available_providers():
        return None, "The installed ONNX Runtime is built for the CPU alone; nothing was run, only looked up."
    if not torch.cuda.is_available():
        return None, "torch sees no CUDA device; nothing was run, only looked up in the registry of kernels."
    return Setting("cuda", small=False), ""


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    words.add_argument("--dry-run", action="store_true", help="every step on the CPU, on small shapes")
    setting, missing = chosen(words.parse_args().dry_run)
    with tempfile.TemporaryDirectory(prefix="gpu-") as place:
        room = Path(place)
        small = setting is None or setting.small
        models = {"stories260k": STORIES, "minilm": minilm_path(), "llama": large(room, small)}
        rows = {name: measured(name, model, room, setting) for name, model in models.items()}
    on_gpu = setting is not None and setting.device == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else "no CUDA device"
    found = {"device": device, "onnxruntime": ort.__version__, "torch": torch.__version__, "models": rows}
    if on_gpu:
        RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    show({**found, "missing": missing})


if __name__ == "__main__":
    main()
