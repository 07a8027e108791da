"""The table in docs/soft-prompts.md is what the benchmark found, and what it found is within its bars."""

from __future__ import annotations

import copy
import json

from benchmarks.soft_matrix import COLUMNS, MODELS, ONNX, RESULTS, SLOT, faults, rendered
from tests.token_subjects import SUBJECTS

RESULT = json.loads(RESULTS.read_text(encoding="utf-8"))


def test_the_page_shows_the_result() -> None:
    assert SLOT.shows(rendered(RESULT))
    page = SLOT.page.read_text(encoding="utf-8")
    assert all(f"| {name} | ✓ " in page for name in MODELS.values())


def test_every_subject_and_method_was_run() -> None:
    assert {name: found["family"] for name, found in RESULT["rows"].items()} == {
        subject.name: subject.family for subject in SUBJECTS
    }
    for found in RESULT["rows"].values():
        assert found["cells"].keys() == COLUMNS.keys()
        assert tuple(found["onnx"]) == (ONNX if found["family"] == "encoder" else ())


def test_the_result_is_within_the_bars_and_faults_are_seen() -> None:
    assert list(faults(RESULT["rows"])) == []
    broken = copy.deepcopy(RESULT["rows"])
    error = {"runs": False, "error": "ValueError", "message": "no"}
    broken["bert"]["cells"]["prompt"]["ours"] = error
    broken["gpt2"]["cells"]["prefix"]["peft"]["difference"] = 2e-5
    broken["opt"]["cells"]["prefix"]["peft"]["difference"] = float("nan")
    broken["albert"]["onnx"] = {"prompt": error, "prefix": {"runs": True, "difference": 2e-4}}
    assert len(list(faults(broken))) == 5
