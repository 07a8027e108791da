"""Every golden through ONNX Runtime, measured here, and the table in docs/goldens.md that says how far they are."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from benchmarks.goldens import CELLS, RESULTS, SLOT, TOLERANCE, Cell, faults, measured, rendered

RESULT = json.loads(RESULTS.read_text(encoding="utf-8"))


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_golden_is_reached(cell: Cell, tmp_path: Path) -> None:
    found, stored = measured(cell, tmp_path / "onnx"), RESULT["cells"][str(cell)]
    assert list(faults({str(cell): found})) == []
    assert 0.1 <= found["difference"] / stored["difference"] <= 10, "the table has another order of magnitude"
    assert found.get("texts") == stored.get("texts")


def test_the_page_shows_the_result() -> None:
    assert SLOT.shows(rendered(RESULT))
    assert list(RESULT["cells"]) == [str(cell) for cell in CELLS] and RESULT["bar"] == TOLERANCE


def test_the_result_is_within_the_bar_and_faults_are_seen() -> None:
    assert list(faults(RESULT["cells"])) == []
    broken = copy.deepcopy(RESULT["cells"])
    broken["minilm_prompt, baked, by reference"]["difference"] = 2e-4
    broken["minilm_prefix, baked, by reference"]["difference"] = float("nan")
    broken["stories260k_lora, merged, copied"]["texts"] = [4, 3]
    assert len(list(faults(broken))) == 3
