"""Encoders with bottlenecks and fusions in ONNX: verified, every parameter under AdapterHub's name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import peftsurgery as ps
from peftsurgery.method import OutputMethod
from tests.output_subjects import FUSION, METHODS, PFEIFFER, SUBJECTS, OutputSubject, trained

BERT = SUBJECTS[0]


def initializers(graph: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(graph).graph.initializer}


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_every_form(method: OutputMethod, tmp_path: Path) -> None:
    adapter, model = trained(BERT, method, "mine"), BERT.model()
    before = BERT.run(model)
    report = ps.export_onnx(model, adapters=adapter, out=tmp_path / "onnx", task="seq-cls")
    assert report.facts["form"] == "grafted"
    assert report.facts["parity"]["max_abs_diff"] <= 1e-5
    assert torch.equal(BERT.run(model), before) and ps.adapters(model) == ()
    held = initializers(tmp_path / "onnx" / "model.onnx")
    for site, params in adapter.params.items():
        for name, value in params.items():
            stored = held[f"{site}.adapters.mine.{name}"]
            assert any(np.array_equal(stored, seen) for seen in (value.numpy(), value.T.numpy())), name


@pytest.mark.parametrize(
    "subject", [s for s in SUBJECTS if s.name in ("distilbert", "mpnet", "albert")], ids=str
)
def test_other_encoders(subject: OutputSubject, tmp_path: Path) -> None:
    adapter = trained(subject, FUSION)
    report = ps.export_onnx(subject.model(), adapters=adapter, out=tmp_path / "onnx", task="seq-cls")
    assert report.facts["parity"]["max_abs_diff"] <= 1e-5


def test_beside_a_merged_lora(tmp_path: Path) -> None:
    model = BERT.model()
    ps.inject(model, ps.LoRA(r=2, init_lora_weights="gaussian"), "query", task="feature-extraction")
    lora = ps.remove(model)
    both = [trained(BERT, PFEIFFER, "bottle"), lora]
    report = ps.export_onnx(model, adapters=both, out=tmp_path / "onnx", task="seq-cls")
    assert report.facts["form"] == "grafted + merged"
    held = initializers(tmp_path / "onnx" / "model.onnx")
    assert any(".adapters.bottle." in name for name in held) and not any("lora" in name for name in held)


def test_a_live_model_that_wears_them(tmp_path: Path) -> None:
    model = ps.inject(BERT.model(), trained(BERT, PFEIFFER, "a"))
    ps.inject(model, trained(BERT, PFEIFFER, "b", seed=3))
    ps.export_onnx(model, out=tmp_path / "onnx", task="seq-cls")
    held = initializers(tmp_path / "onnx" / "model.onnx")
    assert sum(".adapters.a." in name for name in held) == sum(".adapters.b." in name for name in held) == 16
