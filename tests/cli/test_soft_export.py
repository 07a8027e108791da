"""`export-onnx MODEL --adapter SOFT_PROMPT`: baked into a graph that takes plain inputs, its tokens named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import Result
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

import peftsurgery as ps
from fixtures.minilm import minilm_path
from peftsurgery.graph.session import Session

Run = Callable[..., Result]
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def names(graph: Path) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tuple(tensor.dims) for tensor in onnx.load(graph).graph.initializer}


@pytest.mark.parametrize("adapter", ["minilm_prompt", "minilm_ptuning_mlp", "minilm_prefix"])
def test_real_adapters_give_pefts_logits(run: Run, adapter: str, tmp_path: Path) -> None:
    result = run(
        "export-onnx", minilm_path(), "--adapter", f"fixtures/{adapter}", "-o", tmp_path / "onnx", "--json"
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["inputs"] == list(INPUTS)
    golden = np.load(f"fixtures/{adapter}/golden.npz")
    session = Session(tmp_path / "onnx" / "model.onnx", ["cpu"])
    assert np.abs(session({name: golden[name] for name in INPUTS})["logits"] - golden["logits"]).max() <= 1e-4
    held = names(tmp_path / "onnx" / "model.onnx")
    if adapter == "minilm_prefix":
        said = {f"prefix.{layer}.{word}" for layer in range(6) for word in ("key", "value")}
        assert {name: held.get(name) for name in said} == dict.fromkeys(said, (12, 20, 32))
    else:
        assert held["prompt"] == (20, 384)
    assert "bert.encoder.layer.0.attention.self.query.weight" in held


@pytest.mark.parametrize(
    "method",
    [
        ps.PromptTuning(num_virtual_tokens=5),
        ps.PTuning(num_virtual_tokens=5, encoder_hidden_size=16),
        ps.PTuning(num_virtual_tokens=5, encoder_hidden_size=16, encoder_reparameterization_type="LSTM"),
        ps.PrefixTuning(num_virtual_tokens=5),
        ps.PrefixTuning(num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=16),
    ],
    ids=["prompt", "p-tuning-mlp", "p-tuning-lstm", "prefix", "prefix-projected"],
)
def test_encoders_are_baked_away(bert: Path, method: ps.PromptTuning, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    ps.inject(model, method, seed=0)
    adapter = ps.remove(model)
    report = ps.export_onnx(bert, adapters=adapter, out=tmp_path / "onnx")
    assert report.facts["parity"]["max_abs_diff"] <= 1e-4
    held = names(tmp_path / "onnx" / "model.onnx")
    virtual = {"prompt"} if not isinstance(method, ps.PrefixTuning) else {"prefix.0.key", "prefix.1.value"}
    assert virtual <= held.keys()
    assert not [name for name in held if "mlp_head" in name or "transform" in name or "lstm" in name]
    assert ps.adapters(model) == ()


def test_a_prompt_and_a_lora_together(bert: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    live = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    ps.inject(live, ps.LoRA(r=2), "query", name="lora", seed=0)
    with torch.no_grad():
        for parameter in ps.trainable_parameters(live).values():
            parameter.add_(0.1)
    lora = ps.remove(live, "lora")
    ps.inject(live, ps.PromptTuning(num_virtual_tokens=4), name="prompt", seed=0)
    prompt = ps.remove(live, "prompt")
    for form, factored in (("merged", False), ("factored", True)):
        report = ps.export_onnx(bert, adapters=[lora, prompt], out=tmp_path / form, factored=factored)
        assert report.facts["parity"]["max_abs_diff"] <= 1e-4
        held = names(tmp_path / form / "model.onnx")
        assert "prompt" in held
        assert any("lora_A" in name for name in held) == factored


@pytest.mark.parametrize(
    "method", [ps.PromptTuning(num_virtual_tokens=5), ps.PrefixTuning(num_virtual_tokens=5)]
)
def test_a_model_with_few_positions(method: ps.PromptTuning, tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=99,
        max_position_embeddings=24,
    )
    live = BertForSequenceClassification(config)
    ps.inject(live, method, seed=0)
    report = ps.export_onnx(live, out=tmp_path / "onnx")
    assert report.facts["parity"]["max_abs_diff"] <= 1e-4
    assert max(row["length"] for row in report.facts["parity"]["rows"]) == 18


def test_a_prefix_of_zeros_keeps_its_names(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=99
    )
    live = BertForSequenceClassification(config)
    ps.inject(live, ps.PrefixTuning(num_virtual_tokens=3, init_weights="zero"))
    ps.export_onnx(live, out=tmp_path / "onnx")
    assert {"prefix.0.key", "prefix.0.value", "prefix.1.key", "prefix.1.value"} <= names(
        tmp_path / "onnx" / "model.onnx"
    ).keys()
