"""PEFT's own outputs on real adapters, reproduced by the live graft and by the live merge."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import peftsurgery as ps
from fixtures.minilm import minilm_path

FIXTURES = "fixtures"


def minilm() -> tuple[torch.nn.Module, dict[str, np.ndarray]]:
    model = AutoModelForSequenceClassification.from_pretrained(minilm_path(), num_labels=2).eval()
    return model, dict(np.load(f"{FIXTURES}/minilm_lora/golden.npz"))


def stories() -> tuple[torch.nn.Module, dict[str, np.ndarray]]:
    model = AutoModelForCausalLM.from_pretrained(f"{FIXTURES}/stories260k").eval()
    return model, dict(np.load(f"{FIXTURES}/stories260k_lora/golden.npz"))


SUBJECTS = {"minilm_lora": minilm, "stories260k_lora": stories}


def logits(model: torch.nn.Module, golden: dict[str, np.ndarray]) -> torch.Tensor:
    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in golden]
    with torch.no_grad():
        return model(**{name: torch.from_numpy(golden[name]) for name in names}).logits


@pytest.mark.parametrize("name", SUBJECTS)
def test_graft_and_merge_reproduce_peft(name: str) -> None:
    model, golden = SUBJECTS[name]()
    adapter = ps.load_adapter(f"{FIXTURES}/{name}")
    kept = torch.from_numpy(golden["attention_mask"]).bool()

    def difference(output: str) -> float:
        gap = (logits(model, golden) - torch.from_numpy(golden[output])).abs()
        return float((gap if gap.ndim == 2 else gap[kept]).max())

    assert difference("logits") > 0.1
    ps.inject(model, adapter)
    assert difference("logits") <= 1e-5
    assert ps.remove(model) == adapter
    ps.merge(model, adapter)
    assert difference("logits_merged") <= 1e-5
