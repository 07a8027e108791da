"""What AdapterHub's own library computed with real adapters and their fusion, live and in ONNX Runtime."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertForSequenceClassification

import peftsurgery as ps
from fixtures.minilm import minilm_path
from peftsurgery.graph.session import Session

FILES = Path("fixtures/minilm_adapterhub")
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
NAMES = ("complaint", "sentiment")
HEADS = {"complaint": "complaint", "sentiment": "sentiment", "fusion": "fused"}


def stored(file: Path, mark: str) -> dict[str, dict[str, Tensor]]:
    """By site, the parameters that a file of AdapterHub's holds behind `mark`."""
    params: dict[str, dict[str, Tensor]] = {}
    for key, value in torch.load(file, weights_only=True).items():
        site, _, name = key.partition(mark)
        params.setdefault(site, {})[name] = value
    return params


def bottleneck(name: str) -> tuple[ps.Bottleneck, dict[str, dict[str, Tensor]]]:
    said = json.loads((FILES / name / "adapter_config.json").read_text())["config"]
    known = {field.name for field in fields(ps.Bottleneck)}
    method = ps.Bottleneck(**{word: value for word, value in said.items() if word in known})
    return method, stored(FILES / name / "pytorch_adapter.bin", f".adapters.{name}.")


def fusion() -> tuple[ps.AdapterFusion, dict[str, dict[str, Tensor]]]:
    members = {name: bottleneck(name) for name in NAMES}
    params = stored(
        FILES / "fusion" / "pytorch_model_adapter_fusion.bin", ".adapter_fusion_layer.complaint,sentiment."
    )
    for name, (_, own) in members.items():
        for site, values in own.items():
            params[site] |= {f"{name}.{key}": value for key, value in values.items()}
    return ps.AdapterFusion(tuple((name, method) for name, (method, _) in members.items())), params


def adapter(word: str) -> ps.Adapter:
    method, params = fusion() if word == "fusion" else bottleneck(word)
    head = torch.load(FILES / word / "pytorch_model_head.bin", weights_only=True)
    replaced = {f"classifier.{leaf}": head[f"heads.{HEADS[word]}.1.{leaf}"] for leaf in ("weight", "bias")}
    plan = ps.Plan(tuple(ps.Step(ps.Site(site, ps.Kind.OUTPUT, (384,)), method) for site in params))
    return ps.Adapter(plan, params, word, replaced=replaced, task_type="SEQ_CLS")


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(FILES / "golden.npz"))


@pytest.mark.parametrize("word", HEADS)
def test_live(word: str, golden: dict[str, np.ndarray]) -> None:
    model = BertForSequenceClassification.from_pretrained(minilm_path(), num_labels=2).eval()
    ps.inject(model, adapter(word))
    with torch.no_grad():
        out = model(**{n: torch.tensor(golden[n]) for n in INPUTS}, output_hidden_states=True)
    assert np.abs(out.logits.numpy() - golden[f"{word}_logits"]).max() <= 1e-5
    hidden = out.hidden_states[-1][:4].numpy()
    assert np.abs(hidden - golden[f"{word}_last_hidden"]).max() <= 1e-5


@pytest.mark.parametrize("word", HEADS)
def test_in_onnx_runtime(word: str, golden: dict[str, np.ndarray], tmp_path: Path) -> None:
    ps.export_onnx(minilm_path(), adapters=adapter(word), out=tmp_path / "onnx")
    session = Session(tmp_path / "onnx" / "model.onnx", ["cpu"])
    logits = session({name: golden[name] for name in INPUTS})["logits"]
    assert np.abs(logits - golden[f"{word}_logits"]).max() <= 1e-4
