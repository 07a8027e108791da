"""`export-onnx MODEL --adapter SOFT_PROMPT`: baked into a graph that takes plain inputs, its tokens named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import Result
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)

import peftsurgery as ps
from fixtures.minilm import minilm_path
from peftsurgery.graph.session import Session

Run = Callable[..., Result]
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def names(graph: Path) -> dict[str, tuple[int, ...]]:
    return {
        tensor.name: tuple(tensor.dims)
        for tensor in onnx.load(graph, load_external_data=False).graph.initializer
    }


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
    said = {f"prefix.{layer}.{word}": (4, 5, 8) for layer in range(2) for word in ("key", "value")}
    virtual = said if isinstance(method, ps.PrefixTuning) else {"prompt": (5, 32)}
    assert {name: held.get(name) for name in virtual} == virtual
    assert report.facts["inputs"] == list(INPUTS)
    assert "bert.encoder.layer.0.attention.self.query.weight" in held
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
    assert max(row["length"] for row in report.facts["parity"]["rows"]) == 19


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


@pytest.mark.parametrize(
    ("task", "adapter", "words", "reading"),
    [
        (
            "feature-extraction",
            "prompt",
            ("--strip-virtual-outputs",),
            ps.Reading(strip_virtual_outputs=True),
        ),
        ("seq-cls", "prompt", ("--pool", "cls"), ps.Reading(pool="cls")),
        ("seq-cls", "prefix", ("--no-position-shift",), ps.Reading(position_shift=False)),
    ],
)
def test_a_reading_goes_into_the_graph(
    run: Run,
    bert: Path,
    tmp_path: Path,
    task: str,
    adapter: str,
    words: tuple[str, ...],
    reading: ps.Reading,
) -> None:
    method = f"{adapter}-tuning"
    fresh = ("--method", method, "--num-virtual-tokens", 5, "--seed", 1, "--task", task)
    made = run("inject", bert, *fresh, "-o", tmp_path / "a")
    assert made.exit_code == 0, made.output
    asked = ("--adapter", tmp_path / "a", "--task", task, *words)
    done = run("export-onnx", bert, *asked, "-o", tmp_path / "onnx", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["parity"]["max_abs_diff"] <= 1e-4
    compared = run("verify", tmp_path / "onnx", "--against", bert, *asked)
    assert compared.exit_code == 0, compared.output
    lengths = {name: value.shape[1] for name, value in _ran(tmp_path / "onnx").items() if value.ndim == 3}
    assert set(lengths.values()) <= {7}
    assert bool(lengths) == (task == "feature-extraction")
    plain = run("export-onnx", bert, *asked[:4], "-o", tmp_path / "plain", "--json")
    assert plain.exit_code == 0, plain.output
    assert any(
        ours.shape != pefts.shape or np.abs(ours - pefts).max() > 1e-4
        for ours, pefts in zip(
            _ran(tmp_path / "onnx").values(), _ran(tmp_path / "plain").values(), strict=True
        )
    )


def _ran(directory: Path) -> dict[str, np.ndarray]:
    ids = np.arange(14, dtype=np.int64).reshape(2, 7) + 3
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return dict(Session(directory / "model.onnx", ["cpu"])(feeds))


def test_a_reading_without_virtual_tokens_is_refused(run: Run, bert: Path, tmp_path: Path) -> None:
    done = run("export-onnx", bert, "--pool", "cls", "-o", tmp_path / "onnx")
    assert done.exit_code == 1
    assert "no virtual tokens" in done.stderr
    assert not (tmp_path / "onnx").exists()


def test_a_hard_prompt_is_words_in_front(run: Run, tmp_path: Path) -> None:
    """The graph with the prompt, on the words, gives what the base gives on prompt and words together."""
    text, base = "is it a complaint ?", minilm_path()
    made = run("inject", base, "--method", "hard-prompt", "--init-text", text, "-o", tmp_path / "hard")
    assert made.exit_code == 0, made.output
    assert "nothing to train" in made.stdout
    exported = run("export-onnx", base, "--adapter", tmp_path / "hard", "-o", tmp_path / "onnx")
    assert exported.exit_code == 0, exported.output
    words = AutoTokenizer.from_pretrained(base)
    front = words(text, add_special_tokens=False)["input_ids"]
    ids = np.array([words("The parcel never came.")["input_ids"]])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    ours = Session(tmp_path / "onnx" / "model.onnx", ["cpu"])(feeds)["last_hidden_state"]
    with torch.no_grad():
        expected = AutoModel.from_pretrained(base)(torch.tensor([[*front, *ids[0]]])).last_hidden_state
    assert np.abs(ours - expected.numpy()).max() <= 1e-4
    assert ps.load_adapter(tmp_path / "hard").plan.steps[0].method == ps.PromptTuning(len(front))


def test_a_hard_prompt_without_a_tokenizer_is_refused(run: Run, bert: Path, tmp_path: Path) -> None:
    made = run("inject", bert, "--method", "hard-prompt", "--init-text", "is it ?", "-o", tmp_path / "hard")
    assert made.exit_code == 1
    assert "no tokenizer" in made.stderr
    assert not (tmp_path / "hard").exists()


def test_outputs_with_the_prompt_say_how_long_they_are(run: Run, bert: Path, tmp_path: Path) -> None:
    live = AutoModel.from_pretrained(bert)
    ps.inject(live, ps.PromptTuning(num_virtual_tokens=5), seed=0)
    report = ps.export_onnx(live, out=tmp_path / "onnx")
    states, pooled = onnx.load(tmp_path / "onnx" / "model.onnx").graph.output
    said = [axis.dim_param or axis.dim_value for axis in states.type.tensor_type.shape.dim]
    assert said == ["batch_size", "sequence_length + 5", 32]
    assert len(pooled.type.tensor_type.shape.dim) == 2
    assert report.facts["parity"]["max_abs_diff"] <= 1e-4
    assert _ran(tmp_path / "onnx")["last_hidden_state"].shape == (2, 12, 32)
    ps.save_adapter(ps.remove(live), tmp_path / "a")
    compared = run("verify", tmp_path / "onnx", "--against", bert, "--adapter", tmp_path / "a")
    assert compared.exit_code == 0, compared.output


def test_prompts_of_one_base_share_its_weights(run: Run, tmp_path: Path) -> None:
    one, two, base = tmp_path / "one", tmp_path / "two", minilm_path()
    for out, adapter in ((one, "fixtures/minilm_prompt"), (two, "fixtures/minilm_prefix")):
        done = run("export-onnx", base, "--adapter", adapter, "--no-verify", "-o", out)
        assert done.exit_code == 0, done.output
    shared = one / "weights" / "model.safetensors"
    assert os.path.samefile(shared, two / "weights" / "model.safetensors")
    assert (two / "model.onnx").stat().st_size < 0.05 * shared.stat().st_size
    golden = np.load("fixtures/minilm_prefix/golden.npz")
    found = Session(two / "model.onnx", ["cpu"])({name: golden[name] for name in INPUTS})["logits"]
    assert np.abs(found - golden["logits"]).max() <= 1e-4
    shutil.rmtree(one)  # a link keeps what it links to
    assert np.array_equal(
        Session(two / "model.onnx", ["cpu"])({name: golden[name] for name in INPUTS})["logits"], found
    )
