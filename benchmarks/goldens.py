"""Every golden of the fixtures through ONNX Runtime: what PEFT and AdapterHub computed, and what our graphs give.

python -m benchmarks.goldens

A cell exports one real adapter in one form, runs the stored inputs, and keeps the largest difference of a logit from
the stored ones (at attended tokens) and, of a decoder, how many greedy texts are PEFT's, token for token. The table
goes to `docs/goldens.md`; `tests/reference/test_goldens.py` measures every cell anew.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import transformers
from safetensors.numpy import load_file

import peftsurgery as ps
from benchmarks.pages import Slot, number
from fixtures.minilm import minilm_path
from peftsurgery.graph.generation import Decoder, continuing
from peftsurgery.graph.sampling import Sampling
from peftsurgery.graph.session import Session

ROOT = Path(__file__).parents[1]
FIXTURES, RESULTS = ROOT / "fixtures", ROOT / "benchmarks/results/goldens.json"
SLOT = Slot(ROOT / "docs/goldens.md", "goldens")
TOLERANCE = 1e-4
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
Found = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One adapter in one form.

    Args:
        folder: below `fixtures`, where its `golden.npz` is; its adapter too, unless `adapter` names another folder.
        logits: the golden array.
        words: of `export_onnx`.
    """

    folder: str
    form: str
    words: tuple[tuple[str, Any], ...]
    logits: str = "logits"
    adapter: str | None = ""

    @property
    def name(self) -> str:
        if self.adapter is None:
            return "stories260k"
        return f"{self.folder}/{self.adapter}".rstrip("/")

    def export(self, out: Path) -> None:
        """Write the cell's graph into `out`; the goldens are its comparison."""
        base = minilm_path() if self.folder.startswith("minilm") else FIXTURES / "stories260k"
        worn = () if self.adapter is None else FIXTURES / self.folder / self.adapter
        hub = self.folder == "minilm_adapterhub"
        ps.export_onnx(base, adapters=worn, out=out, verify=False, allow_pickle=hub, **dict(self.words))

    def __str__(self) -> str:
        return f"{self.name}, {self.form}"


def cell(folder: str, form: str, logits: str = "logits", adapter: str | None = "", **words: Any) -> Cell:
    return Cell(folder, form, tuple(words.items()), logits, adapter)


LORA, PREFIX, HUB = "stories260k_lora", "stories260k_prefix_proj", "minilm_adapterhub"
CELLS = (
    cell("minilm_lora", "merged, by reference", "logits_merged", weights="reference"),
    cell("minilm_lora", "merged, copied", "logits_merged", weights="copy"),
    cell("minilm_lora", "factored, by reference", weights="reference", factored=True),
    cell("minilm_prompt", "baked, by reference", weights="reference"),
    cell("minilm_ptuning_mlp", "baked, by reference", weights="reference"),
    cell("minilm_prefix", "baked, by reference", weights="reference"),
    cell(HUB, "grafted, by reference", "complaint_logits", "complaint", weights="reference"),
    cell(HUB, "grafted, by reference", "sentiment_logits", "sentiment", weights="reference"),
    cell(HUB, "fused, by reference", "fusion_logits", "fusion", weights="reference"),
    cell(LORA, "no adapter, by reference", "base_logits", None, weights="reference"),
    cell(LORA, "merged, by reference", "logits_merged", weights="reference"),
    cell(LORA, "merged, copied", "logits_merged", weights="copy"),
    cell(LORA, "factored, by reference", weights="reference", factored=True),
    cell(LORA, "factored, copied", weights="copy", factored=True),
    cell(PREFIX, "baked, by reference", weights="reference"),
    cell(PREFIX, "baked, copied", weights="copy"),
    cell(PREFIX, "from a file, by reference", weights="reference", prefix="file"),
)


def measured(one: Cell, out: Path) -> Found:
    """The largest difference of a logit, and how many greedy texts are the stored ones, where texts are stored."""
    one.export(out)
    golden = dict(np.load(FIXTURES / one.folder / "golden.npz"))
    if one.folder.startswith("minilm"):
        found = Session(out / "model.onnx", ["cpu"])({name: golden[name] for name in INPUTS})["logits"]
        return {"difference": float(np.abs(found - golden[one.logits]).max())}
    return written(one, out, golden)


def written(one: Cell, out: Path, golden: Mapping[str, Any]) -> Found:
    """The same of a decoder."""
    decoder = Decoder(out, ["cpu"])
    file = out / "prefix.safetensors"
    prefix = [load_file(file)] if file.is_file() else []
    ids, mask = golden["input_ids"], golden["attention_mask"]
    assert isinstance(decoder.session, Session)
    gap = np.abs(continuing(decoder.session, mask, prefix * len(ids))(ids) - golden[one.logits])
    found: Found = {"difference": float(gap[mask.astype(bool)].max())}
    if one.adapter is None:
        return {**found, "texts": [1, int(greedy_text(decoder) == stored_text())]}
    given = zip(
        golden["gen_leftpad_input_ids"], golden["gen_leftpad_attention_mask"].astype(bool), strict=True
    )
    rows = [row[kept].tolist() for row, kept in given]
    expected = golden["gen_leftpad"][:, golden["gen_leftpad_input_ids"].shape[1] :].tolist()
    texts = decoder.generate(rows, Sampling(len(expected[0])), prefixes=prefix * len(rows))
    return {**found, "texts": [len(rows), sum(a == b for a, b in zip(texts, expected, strict=True))]}


def greedy_text(decoder: Decoder) -> str:
    """What the model without an adapter writes, from the first words of the stored text on."""
    start = decoder.tokenizer("Once upon a time")["input_ids"]
    count = len(decoder.tokenizer(stored_text())["input_ids"]) - len(start)
    tokens = decoder.generate([start], Sampling(count))[0]
    return str(decoder.tokenizer.decode([*start, *tokens], skip_special_tokens=True)).strip()


def stored_text() -> str:
    return (FIXTURES / "stories260k" / "golden_greedy.txt").read_text(encoding="utf-8").strip()


def rendered(results: Found) -> str:
    """The table in Markdown, from what `goldens.json` holds."""
    lines = ["| golden | form | largest difference of a logit | greedy texts the same |", "|---|---|---|---|"]
    for one in CELLS:
        found = results["cells"][str(one)]
        texts = f"{found['texts'][1]} of {found['texts'][0]}" if "texts" in found else "–"
        lines.append(f"| {one.name} | {one.form} | {number(found['difference'])} | {texts} |")
    versions = ", ".join(" ".join(pair) for pair in results["setting"].items())
    return "\n".join([*lines, "", f"With {versions}."])


def faults(cells: Mapping[str, Found]) -> Iterator[str]:
    """Differences above the bar, and texts that are others."""
    for name, found in cells.items():
        # `not <=` and never `>`: a NaN is a fault.
        if not found["difference"] <= TOLERANCE:
            yield f"{name}: {found['difference']:.1e} from the golden logits"
        if "texts" in found and found["texts"][0] != found["texts"][1]:
            yield f"{name}: {found['texts'][1]} of {found['texts'][0]} texts"


def main() -> int:
    cells = {}
    for one in CELLS:
        with tempfile.TemporaryDirectory() as folder:
            cells[str(one)] = measured(one, Path(folder) / "onnx")
        print(one, cells[str(one)], flush=True)
    setting = {one.__name__: one.__version__ for one in (torch, transformers, onnxruntime)}
    results = {"setting": setting, "bar": TOLERANCE, "cells": cells}
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    SLOT.fill(rendered(results))
    wrong = list(faults(cells))
    print("\n".join(wrong) or f"{len(cells)} cells, all within the bar.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
