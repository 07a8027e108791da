"""The table of families and methods in docs/export.md is what was measured; a cell of every kind is measured here."""

from __future__ import annotations

import json

import pytest

from benchmarks.coverage import FAMILIES, METHODS, RESULTS, SLOT, faults, measured, rendered

RESULT = json.loads(RESULTS.read_text(encoding="utf-8"))
LORA, FUSION, PROMPT, PREFIX = METHODS
HERE = (
    ("encoder-decoders", "BartForConditionalGeneration", FUSION),
    ("encoder-decoders", "MBartForConditionalGeneration", FUSION),
    ("encoder-decoders", "T5ForConditionalGeneration", PROMPT),
    ("decoders", "LlamaForCausalLM", FUSION),
    ("decoders", "BloomForCausalLM", PROMPT),
    ("decoders", "FalconForCausalLM", PREFIX),
    ("images", "SiglipVisionModel", FUSION),
    ("images", "DeiTForImageClassification", FUSION),
    ("images", "BeitForImageClassification", LORA),
    ("images", "SwinForImageClassification", LORA),
    ("images", "Dinov2Model", LORA),
    ("images", "SwinForImageClassification", FUSION),
    ("images", "CLIPTextModel", FUSION),
)
"""What no other test exports."""


REFUSED = ("images", "CLIPTextModel", PROMPT)


@pytest.mark.parametrize(("family", "name", "method"), [*HERE, REFUSED], ids=" ".join)
def test_a_cell(family: str, name: str, method: str) -> None:
    found = measured(family, name, method)
    assert list(faults({family: {name: {method: found}}})) == []
    assert ("refused" in found) == ((family, name, method) == REFUSED)


def test_the_page_shows_the_result() -> None:
    assert SLOT.shows(rendered(RESULT))
    assert not {*RESULT["rows"]} - {*FAMILIES}
    for family, models in RESULT["rows"].items():
        assert not {*models} - {*FAMILIES[family]}
        assert not {method for cells in models.values() for method in cells} - {*METHODS}


def test_the_result_is_within_the_bar_and_faults_are_seen() -> None:
    assert list(faults(RESULT["rows"])) == []
    good = {"difference": 1e-6, "moved": 1.0}
    broken = {
        "error": {"error": "ValueError: no"},
        "far": {**good, "difference": 2e-4},
        "nan": {**good, "difference": float("nan")},
        "still": {**good, "moved": 0.0},
        "refused": {"refused": "It has none"},
        "good": good,
    }
    assert len(list(faults({"encoders": {"BertModel": broken}}))) == 4
