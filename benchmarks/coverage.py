"""What exports with what: every method on every family, each cell exported and compared with torch in ONNX Runtime.

python -m benchmarks.coverage [encoders|decoders|encoder-decoders|images …]

The models are small and random, of one layer, no weight of them 0 or 1; the adapter's parameters are away from their
start and move the outputs, or the cell is a fault. The built-in comparison of `export-onnx` runs them on several
batches and lengths, padded, a decoder behind a past, an encoder-decoder in two steps. A refusal is kept with its
sentence. Cells that the results have stay, those of a family that is named are measured again; what was measured is
kept when it is interrupted. The table goes to `docs/export.md`.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import transformers
from torch import Tensor, nn

import peftsurgery as ps
from benchmarks.pages import Slot, number
from peftsurgery.errors import PlanError
from peftsurgery.graph.inputs import as_torch, sample
from peftsurgery.graph.signature import signature
from tests.output_subjects import FUSION
from tests.reference import test_export_decoders as decoders
from tests.reference import test_export_seq2seq as pairs
from tests.reference import test_export_vision as images
from tests.reference.test_export import CASES as ENCODERS
from tests.reference.test_export import SIZES as ENCODER
from tests.subjects import transformer

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/coverage.json"
SLOT = Slot(ROOT / "docs/export.md", "coverage")
TOLERANCE, MOVED = 1e-4, 1e-3
Found = dict[str, Any]
Words = dict[str, Any]

SHALLOW = {"num_hidden_layers": 1, "n_layer": 1, "num_layers": 1}
SOME_T5, SOME_BART = {**pairs.T5, **pairs.WORDS}, {**pairs.BART, **pairs.PLACES, "decoder_layers": 1}
SHARED = {**decoders.GROUPED, **decoders.EXPERTS, "shared_expert_intermediate_size": 24}
DECODERS: dict[str, Words] = {**decoders.CASES, "Qwen2MoeForCausalLM": SHARED}
GATED = {**SOME_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
FAMILIES: dict[str, dict[str, tuple[str, Words]]] = {
    "encoders": {case.name: (case.name, {**ENCODER, **dict(case.own)}) for case in ENCODERS},
    "decoders": {name: (name, {**decoders.SIZES, **own, **SHALLOW}) for name, own in DECODERS.items()},
    "encoder-decoders": {
        "T5ForConditionalGeneration": ("T5ForConditionalGeneration", SOME_T5),
        "T5ForConditionalGeneration, gated": ("T5ForConditionalGeneration", GATED),
        **{
            name: (name, SOME_BART)
            for name in (
                "BartForConditionalGeneration",
                "MBartForConditionalGeneration",
                "PegasusForConditionalGeneration",
                "MarianMTModel",
            )
        },
    },
    "images": {
        **{
            case.name: (case.name, {**dict(case.sizes), **SHALLOW})
            for case in images.CASES
            if case.name not in ("ViTModel", "CLIPVisionModelWithProjection", "CLIPTextModelWithProjection")
        },
        "SiglipVisionModel": ("SiglipVisionModel", {**images.IMAGE, **SHALLOW}),
    },
}
METHODS: dict[str, tuple[ps.Method, str | None]] = {
    "LoRA, factored": (ps.LoRA(r=3), "all-linear"),
    "fusion of bottlenecks": (FUSION, "mh_adapter,output_adapter"),
    "p-tuning, baked to a prompt": (ps.PTuning(num_virtual_tokens=4, encoder_hidden_size=16), None),
    "prefix": (ps.PrefixTuning(num_virtual_tokens=3), None),
}
"""A column for each kind of graph: a merged LoRA's is the base's, and baking makes a prompt of a p-tuning."""
NOISE, LESS = 0.3, {("T5ForConditionalGeneration, gated", "LoRA, factored"): 0.1}
"""How far parameters are moved; where a product of two maps makes torch's own float32 2e-4 off its float64, less."""


def measured(family: str, name: str, method: str) -> Found:
    """One cell: how far ONNX Runtime is from torch and how far the adapter moved the outputs, or the refusal."""
    cls, words = FAMILIES[family][name]
    formula, targets = METHODS[method]
    model = transformer(cls, words, spread=0.1)
    said = signature(model)
    feed = (
        as_torch(sample(said), said) if family != "decoders" else {"input_ids": torch.tensor([[5, 9, 33, 7]])}
    )
    plain = first(model, feed)
    try:
        ps.inject(model, formula, **({} if targets is None else {"targets": targets}), seed=0)
    except PlanError as error:
        return {"refused": re.split(r"[;.] ", str(error))[0]}
    moved = far(model, feed, plain, LESS.get((name, method), NOISE))
    try:
        with tempfile.TemporaryDirectory() as folder:
            report = ps.export_onnx(model, adapters=ps.remove(model), out=f"{folder}/onnx", factored=True)
    except Exception as error:  # whatever fails is a fault, and the next cell is measured
        return {"error": f"{type(error).__name__}: {str(error)[:200]}"}
    return {"difference": report.facts["parity"]["max_abs_diff"], "moved": moved}


@torch.no_grad()
def far(model: nn.Module, feed: Mapping[str, Tensor], plain: Tensor, spread: float) -> float:
    """Move the adapter's parameters away from their start; how far the output went."""
    noise = torch.Generator().manual_seed(1)
    for parameter in ps.trainable_parameters(model).values():
        parameter.add_(spread * torch.randn(parameter.shape, generator=noise))
    now = first(model, feed)
    if now.shape != plain.shape:  # virtual tokens come out too, in front
        now = now[:, -plain.shape[1] :]
    return float((now - plain).abs().max())


@torch.no_grad()
def first(model: nn.Module, feed: Mapping[str, Tensor]) -> Tensor:
    """Its logits or hidden states."""
    given = model(**feed)
    return next(tensor for tensor in given.values() if isinstance(tensor, Tensor))


def cell(found: Found | None) -> str:
    if found is None:
        return "·"
    if "refused" in found:
        return "–"
    return "✗" if "error" in found else f"✓ {number(found['difference'])}"


def rendered(results: Found) -> str:
    """The table in Markdown, from what `coverage.json` holds."""
    head = ("model", *METHODS)
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for family, models in FAMILIES.items():
        for name in models:
            cells = results["rows"].get(family, {}).get(name, {})
            lines.append(f"| {name} | {' | '.join(cell(cells.get(method)) for method in METHODS)} |")
    versions = ", ".join(" ".join(pair) for pair in results["setting"].items())
    return "\n".join(
        [*lines, "", f"With {versions}. · was not measured yet.", "", *refusals(results["rows"])]
    )


def refusals(rows: Found) -> Iterator[str]:
    """What each refusal says, and of which cells."""
    said: dict[str, list[str]] = {}
    for models in rows.values():
        for name, cells in models.items():
            for method, found in cells.items():
                if "refused" in found:
                    sentence = found["refused"].replace(name.split(",")[0], "the model")
                    said.setdefault(sentence, []).append(f"{name}, {method}")
    yield "–, in the words of the refusal:"
    yield ""
    for sentence, refused in said.items():
        yield f"* “{sentence}”: {'; '.join(refused)}"


def faults(rows: Found) -> Iterator[str]:
    """Cells that fail, differ by more than the bar, or whose adapter does nothing."""
    for models in rows.values():
        for name, cells in models.items():
            for method, found in cells.items():
                if "error" in found:
                    yield f"{name}, {method}: {found['error']}"
                # `not <=` and never `>`: a NaN is a fault.
                elif "difference" in found and not found["difference"] <= TOLERANCE:
                    yield f"{name}, {method}: {found['difference']:.1e} from torch"
                elif "difference" in found and not found["moved"] >= MOVED:
                    yield f"{name}, {method}: the adapter moves nothing ({found['moved']:.1e})"


def missing(rows: Found, again: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """The cells that are to be measured."""
    for family, models in FAMILIES.items():
        for name in models:
            held = {} if family in again else rows.get(family, {}).get(name, {})
            yield from ((family, name, method) for method in METHODS if method not in held)


def main(families: Sequence[str]) -> int:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if RESULTS.is_file() else {}
    for family, name, method in list(missing(rows, families)):
        found = measured(family, name, method)
        rows.setdefault(family, {}).setdefault(name, {})[method] = found
        print(f"{name}, {method}: {cell(found)}", flush=True)
        keep(rows)
    wrong = list(faults(rows))
    print("\n".join(wrong) or "All cells within the bar, or refused.")
    return 1 if wrong else 0


def keep(rows: Found) -> None:
    """Write the results and the table."""
    setting = {one.__name__: one.__version__ for one in (torch, transformers, onnxruntime)}
    results = {"setting": setting, "bar": TOLERANCE, "rows": rows}
    RESULTS.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    SLOT.fill(rendered(results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
