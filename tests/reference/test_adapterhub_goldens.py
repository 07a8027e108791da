"""What AdapterHub's own library computed with real adapters and their fusion, reproduced live."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertForSequenceClassification

import peftsurgery as ps
from fixtures.minilm import minilm_path

FILES = Path("fixtures/minilm_adapterhub")
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
WORDS = ("complaint", "sentiment", "fusion")


def adapter(word: str) -> ps.Adapter:
    return ps.load_adapter(FILES / word, allow_pickle=True)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(FILES / "golden.npz"))


@pytest.mark.parametrize("word", WORDS)
def test_live(word: str, golden: dict[str, np.ndarray]) -> None:
    model = BertForSequenceClassification.from_pretrained(minilm_path(), num_labels=2).eval()
    ps.inject(model, adapter(word))
    with torch.no_grad():
        out = model(**{n: torch.tensor(golden[n]) for n in INPUTS}, output_hidden_states=True)
    assert np.abs(out.logits.numpy() - golden[f"{word}_logits"]).max() <= 1e-5
    hidden = out.hidden_states[-1][:4].numpy()
    assert np.abs(hidden - golden[f"{word}_last_hidden"]).max() <= 1e-5
