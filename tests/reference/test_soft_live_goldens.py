"""PEFT's own outputs on real soft prompts, reproduced on the live model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import peftsurgery as ps
from fixtures.minilm import minilm_path

FIXTURES = "fixtures"
NAMES = ("input_ids", "attention_mask", "token_type_ids")


def stored(name: str) -> dict[str, torch.Tensor]:
    arrays = np.load(f"{FIXTURES}/{name}/golden.npz")
    return {key: torch.from_numpy(arrays[key]) for key in arrays if arrays[key].dtype.kind != "U"}


def batch(golden: dict[str, torch.Tensor], start: str = "") -> dict[str, torch.Tensor]:
    return {name: golden[start + name] for name in NAMES if start + name in golden}


def gap(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result - expected).abs().max())


@pytest.fixture(scope="module")
def minilm() -> torch.nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(minilm_path(), num_labels=2).eval()


@pytest.fixture
def stories() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(f"{FIXTURES}/stories260k").eval()


@pytest.mark.parametrize("name", ["minilm_prompt", "minilm_ptuning_mlp", "minilm_prefix"])
@torch.no_grad()
def test_minilm(minilm: torch.nn.Module, name: str) -> None:
    golden, adapter = stored(name), ps.load_adapter(f"{FIXTURES}/{name}")
    plain = minilm(**batch(golden)).logits
    ps.inject(minilm, adapter)
    try:
        assert gap(minilm(**batch(golden)).logits, golden["logits"]) <= 1e-5
        assert gap(minilm(**batch(golden, "single_")).logits, golden["logits_single"]) <= 1e-5
    finally:
        taken = dict(ps.remove(minilm).tensors())
    assert all(torch.equal(tensor, taken.pop(key)) for key, tensor in adapter.tensors())
    assert not taken
    assert gap(plain, golden["logits"]) > 0.1
    assert torch.equal(minilm(**batch(golden)).logits, plain)


@torch.no_grad()
def test_an_encoder_that_peft_lost_gives_the_same(minilm: torch.nn.Module) -> None:
    name = "minilm_ptuning_mlp"
    golden, raw = stored(name), load_file(f"{FIXTURES}/{name}/prompt_encoder_raw.safetensors")
    plan = ps.plan(minilm, ps.PTuning(20, encoder_hidden_size=128))
    heads = ps.load_adapter(f"{FIXTURES}/{name}").replaced
    ps.inject(minilm, ps.Adapter(plan, {plan.sites[0].name: {}}, shared=raw, replaced=heads))
    try:
        assert gap(minilm(**batch(golden)).logits, golden["logits"]) <= 1e-5
    finally:
        ps.remove(minilm)


@torch.no_grad()
def test_stories(stories: torch.nn.Module) -> None:
    name = "stories260k_prefix_proj"
    golden, adapter = stored(name), ps.load_adapter(f"{FIXTURES}/{name}")
    kept = golden["attention_mask"].bool()
    assert gap(stories(**batch(golden)).logits[kept], golden["logits"][kept]) > 0.1
    ps.inject(stories, adapter)
    assert gap(stories(**batch(golden)).logits[kept], golden["logits"][kept]) <= 1e-5
    prompts, whole = batch(golden, "gen_leftpad_"), golden["gen_leftpad"]
    new = whole.shape[1] - prompts["input_ids"].shape[1]
    assert torch.equal(stories.generate(**prompts, max_new_tokens=new, do_sample=False), whole)
