"""What a model of experts costs as a graph, beside torch: the Loop of `graph/experts.py` in ONNX Runtime.

python -m benchmarks.experts

A random Qwen3-MoE of three layers with 16 experts each, two of them for every word, in float32 on one thread. The forms
take turns on the same text; torch has a form of its own for experts in groups, and one that takes a word's matrices out
of the stack, whose memory grows with the text and which long ones are spared. What counts is the first quartile of a
form's times over that of torch's groups.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
import transformers
from rich.console import Console
from rich.table import Table

import peftsurgery as ps

RESULTS = Path(__file__).parent / "results" / "experts.json"
LENGTHS, SPARED, SECONDS = (1, 16, 128, 512), 512, 4.0
GROUPS, TAKEN, LOOP = "torch, in groups", "torch, taken out", "ONNX Runtime"
SIZES = {
    **{"hidden_size": 512, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4},
    **{"head_dim": 64, "vocab_size": 500, "intermediate_size": 1024, "moe_intermediate_size": 1024},
    **{"num_experts": 16, "num_experts_per_tok": 2},
}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES)).eval()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        ps.export_onnx(model, out=f"{folder}/onnx", verify=False)
        session = ort.InferenceSession(
            f"{folder}/onnx/model.onnx", options, providers=["CPUExecutionProvider"]
        )
    rows = {length: quartiles(forms(model, session, length)) for length in LENGTHS}
    said = {"torch": torch.__version__, "onnxruntime": ort.__version__, "ms": rows}
    RESULTS.write_text(json.dumps(said, indent=2) + "\n")
    table = Table("words", f"{GROUPS}, ms", TAKEN, LOOP, title="Experts: times over those of torch's groups")
    for length, found in rows.items():
        ratios = [f"{found[name] / found[GROUPS]:.2f}" if name in found else "-" for name in (TAKEN, LOOP)]
        table.add_row(str(length), f"{found[GROUPS]:.1f}", *ratios)
    Console().print(table)


def forms(
    model: transformers.PreTrainedModel, session: ort.InferenceSession, length: int
) -> dict[str, Callable[[], object]]:
    """What is timed, by name; all give the same logits."""
    ids = np.random.default_rng(0).integers(0, 500, (1, length))
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(length)[None]}
    past = {port.name: np.zeros((1, 4, 0, 64), np.float32) for port in session.get_inputs()[3:]}

    def in_torch(way: str) -> Callable[[], object]:
        def run() -> object:
            model.set_experts_implementation(way)
            with torch.no_grad():
                return model(torch.from_numpy(ids)).logits.numpy()

        return run

    found = {GROUPS: in_torch("grouped_mm"), LOOP: lambda: session.run(["logits"], {**feed, **past})[0]}
    if length < SPARED:
        found[TAKEN] = in_torch("batched_mm")
    answers = [run() for run in found.values()]
    assert all(np.allclose(answer, answers[0], atol=1e-4) for answer in answers)
    return found


def quartiles(found: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The first quartile of each form's times, in milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in found}
    until = time.perf_counter() + SECONDS
    while time.perf_counter() < until or len(times[GROUPS]) < 3:
        for name, run in found.items():
            start = time.perf_counter()
            run()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: float(np.percentile(taken, 25)) for name, taken in times.items()}


if __name__ == "__main__":
    main()
