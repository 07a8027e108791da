"""What runs where: every architecture with every soft prompt, ours beside PEFT's, and what ONNX makes of it.

python -m benchmarks.soft_matrix

The models are those of the laws (`tests/token_subjects.py`), small and random; the parameters are PEFT's own,
put on both. A cell of ours is the whole operation: inject, forward, backward into every parameter, remove.
The table goes to `docs/soft-prompts.md`, between two comments.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn

import peftsurgery as ps
from benchmarks.pages import Slot, number
from tests.laws.test_live_laws import assert_same, snapshot
from tests.reference.test_soft_parity import METHODS, TASKS, TOLERANCE, both, config, gap
from tests.token_subjects import SUBJECTS, TokenSubject

RESULTS = Path(__file__).parent / "results" / "soft_matrix.json"
SLOT = Slot(Path(__file__).parents[1] / "docs" / "soft-prompts.md", "soft-matrix")
ONNX_TOLERANCE = 1e-4
ONNX = ("prompt", "prefix")
MODELS = {
    "bert": "BERT",
    "roberta": "RoBERTa",
    "electra": "ELECTRA",
    "mpnet": "MPNet",
    "albert": "ALBERT",
    "distilbert": "DistilBERT",
    "modernbert": "ModernBERT",
    "deberta-v2": "DeBERTa-v2",
    "gpt2": "GPT-2",
    "llama-gqa": "Llama (GQA)",
    "opt": "OPT",
    "qwen2": "Qwen2",
    "t5": "T5",
    "bart": "BART",
}
COLUMNS = {
    "prompt": "prompt tuning",
    "p-tuning-mlp": "p-tuning, MLP",
    "p-tuning-lstm": "p-tuning, LSTM",
    "prefix": "prefix",
    "prefix-projected": "prefix, projected",
}
Found = dict[str, Any]


def method_of(subject: TokenSubject, word: str) -> Any:
    return METHODS[word][0](2 if subject.family == "seq2seq" else 1)


def operate(subject: TokenSubject, word: str) -> None:
    """Inject, forward, backward and remove; an AssertionError where one of them is not all that it should be."""
    model = subject.model()
    before, plain = snapshot(model), subject.run(model)
    ps.inject(model, method_of(subject, word), seed=0, task="feature-extraction")
    theta = ps.trainable_parameters(model)
    start = {name: p.detach().clone() for name, p in theta.items()}
    logits = model(**subject.inputs()).logits
    assert logits.isfinite().all(), "logits that are no numbers"
    assert logits.shape != plain.shape or gap(logits.detach(), plain) > 1e-3, "no effect"
    logits.pow(2).sum().backward()
    still = [name for name, p in theta.items() if p.grad is None or not p.grad.any()]
    assert theta and not still, f"no gradient in {still}"
    adapter = ps.remove(model)
    assert_same(before, model)
    assert torch.equal(subject.run(model), plain), "other logits after the removal"
    assert all(torch.equal(adapter.shared[name.split(".default.")[1]], p) for name, p in start.items())


def ours(subject: TokenSubject, word: str) -> Found:
    try:
        operate(subject, word)
    except Exception as error:
        return failed(error)
    return {"runs": True}


def theirs(subject: TokenSubject, word: str) -> Found:
    """Whether PEFT runs: with what it finds out by itself, or else where it is told the sizes."""
    attempts: list[Found] = []
    for told in ("", subject.name):
        try:
            tuned = peft.get_peft_model(subject.model(), config(word, TASKS[subject.family], told)).eval()
            with torch.no_grad():
                tuned(**subject.inputs())
        except Exception as error:
            attempts.append(failed(error))
            continue
        return {"runs": True, "untold": attempts}
    return attempts[-1]


@torch.no_grad()
def apart(subject: TokenSubject, word: str, told: bool) -> float:
    """The largest difference of a logit between ours and PEFT's with the same parameters, padded and not."""
    mine, peft_s = both(subject.model, word, TASKS[subject.family], subject.name if told else "")
    calls = [subject.inputs(padded) for padded in (True, False)]
    gaps = [gap(mine(**call).logits, peft_s(**call).logits) for call in calls]
    return float(torch.tensor(gaps).max())  # Python's max may pass over a NaN


def compared(subject: TokenSubject, word: str) -> Found:
    """A cell of the table; where the two cannot be compared, the failure is ours."""
    own, their = ours(subject, word), theirs(subject, word)
    if own["runs"] and their["runs"]:
        try:
            their["difference"] = apart(subject, word, bool(their["untold"]))
        except Exception as error:
            own = failed(error)
    return {"ours": own, "peft": their}


def roomy(subject: TokenSubject) -> TokenSubject:
    """The subject with 128 positions: exports are compared on up to 64 tokens, and a prompt comes on top."""

    def build() -> nn.Module:
        small = subject.build()
        small.config.max_position_embeddings = 128
        return type(small)(small.config)

    return replace(subject, build=build)


def exported(subject: TokenSubject, word: str) -> Found:
    """The largest difference between ONNX Runtime and torch, over several batches and lengths."""
    model = roomy(subject).model()
    ps.inject(model, method_of(subject, word), seed=0, task="feature-extraction")
    adapter = ps.remove(model)
    try:
        with tempfile.TemporaryDirectory() as folder:
            report = ps.export_onnx(model, adapters=adapter, out=f"{folder}/onnx", tolerance=ONNX_TOLERANCE)
    except Exception as error:
        return failed(error)
    return {"runs": True, "difference": report.facts["parity"]["max_abs_diff"]}


def failed(error: Exception) -> Found:
    first = next(iter(str(error).strip().splitlines()), "no message")
    return {"runs": False, "error": type(error).__name__, "message": first[:200]}


def row(subject: TokenSubject) -> Found:
    cells = {word: compared(subject, word) for word in COLUMNS}
    graphs = {word: exported(subject, word) for word in ONNX} if subject.family == "encoder" else {}
    return {"family": subject.family, "cells": cells, "onnx": graphs}


def cell(found: Found) -> str:
    if not found["runs"]:
        return f"✗ {found['error']}"
    gap_of = [number(found["difference"])] if "difference" in found else []
    return " ".join(["✓", *gap_of, *(["†"] if found.get("untold") else [])])


def line(name: str, found: Found) -> str:
    cells = [
        f"{cell(found['cells'][word]['ours'])} / {cell(found['cells'][word]['peft'])}" for word in COLUMNS
    ]
    graphs = " · ".join(cell(found["onnx"][word]) for word in ONNX) if found["onnx"] else "–"
    return f"| {' | '.join((MODELS[name], *cells, graphs))} |"


def notes(results: Found) -> Iterator[str]:
    """Under the table: what it ran with, and what every failure said."""
    versions = ", ".join(" ".join(pair) for pair in results["setting"].items())
    yield f"With {versions}."
    everything = [side for found in results["rows"].values() for side in sides(found)]
    untold = [attempt for side in everything for attempt in side.get("untold", ())]
    if untold:
        yield f"† PEFT runs once it is told `token_dim`; until then: {said(untold)}."
    silent = [side for side in everything if not side["runs"]]
    if silent:
        yield f"✗: {said(silent)}."


def said(errors: list[Found]) -> str:
    return "; ".join(sorted({f"{e['error']}, “{e['message'].rstrip('.')}”" for e in errors}))


def sides(found: Found) -> list[Found]:
    return [side for pair in found["cells"].values() for side in pair.values()] + [*found["onnx"].values()]


def rendered(results: Found) -> str:
    """The table in Markdown, from what `soft_matrix.json` holds."""
    head = ("ours / PEFT", *COLUMNS.values(), "ONNX: prompt · prefix")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [line(name, found) for name, found in results["rows"].items()]
    return "\n\n".join(["\n".join(lines), *notes(results)])


def faults(rows: Mapping[str, Found]) -> Iterator[str]:
    """Cells of ours that do not run, and differences above the bars."""
    for name, found in rows.items():
        for word, pair in found["cells"].items():
            if not pair["ours"]["runs"]:
                yield f"{name}, {word}: {pair['ours']['error']}: {pair['ours']['message']}"
            # `not <=` and never `>`: a NaN is a fault.
            elif pair["peft"]["runs"] and not pair["peft"]["difference"] <= TOLERANCE:
                yield f"{name}, {word}: {pair['peft']['difference']:.1e} from PEFT"
        for word, graph in found["onnx"].items():
            if not graph["runs"]:
                yield f"{name}, {word} in ONNX: {graph['error']}: {graph['message']}"
            elif not graph["difference"] <= ONNX_TOLERANCE:
                yield f"{name}, {word} in ONNX: {graph['difference']:.1e} from torch"


def measured() -> Found:
    rows = {}
    for subject in SUBJECTS:
        rows[subject.name] = row(subject)
        print(line(subject.name, rows[subject.name]), flush=True)
    setting = {name: version(name) for name in ("torch", "transformers", "peft", "peftsurgery")}
    bars = {"peft": TOLERANCE, "onnx": ONNX_TOLERANCE}
    return {"setting": setting, "bars": bars, "rows": rows}


def main() -> int:
    warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    results = measured()
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    SLOT.fill(rendered(results))
    wrong = list(faults(results["rows"]))
    print("\n".join(wrong) or f"{len(results['rows']) * len(COLUMNS)} cells, all within the bars.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
