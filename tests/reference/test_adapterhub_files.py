"""AdapterHub's own library, through what it wrote and what it computed: its adapters here, and ours there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn

import peftsurgery as ps
from fixtures.adapterhub.ours import CASES, write

ROOT = Path("fixtures/adapterhub")
GOLDEN = dict(np.load(ROOT / "golden.npz"))
THEIRS = sorted(name.removeprefix("theirs/") for name in GOLDEN if name.startswith("theirs/"))
BASES = sorted(path.name for path in (ROOT / "bases").iterdir())
HEADED = {
    "answers": tf.AutoModelForQuestionAnswering,
    "tags": tf.AutoModelForTokenClassification,
    "vit": tf.AutoModelForImageClassification,
}


def base_of(case: str) -> str:
    name = case.removeprefix("head-")
    return next(base for base in sorted(BASES, key=len, reverse=True) if name.startswith(base))


def model(case: str, labels: int = 3) -> nn.Module:
    """The base of a case, with a head where the case has one."""
    found: Any = tf.AutoModel
    more: dict[str, Any] = {}
    if case.startswith("head-"):
        found = next((cls for word, cls in HEADED.items() if case.endswith(word)), None)
        found = found or tf.AutoModelForSequenceClassification
        more = {} if case.endswith("answers") else {"num_labels": labels}
    path = ROOT / "bases" / base_of(case)
    return found.from_pretrained(path, dtype=torch.float32, **more).eval()


def output(live: nn.Module, case: str) -> np.ndarray[Any, Any]:
    given = {
        key.rpartition("/")[2]: torch.from_numpy(value)
        for key, value in GOLDEN.items()
        if key.startswith(f"inputs/{base_of(case)}/")
    }
    with torch.no_grad():
        out = live(**given)
    if "start_logits" in out:
        return torch.stack([out.start_logits, out.end_logits], -1).numpy()
    return (out.logits if "logits" in out else out.last_hidden_state).numpy()


@pytest.mark.parametrize("base", BASES)
def test_bases(base: str) -> None:
    """What is compared is the adapter: without one, both libraries agree."""
    assert np.abs(output(model(base), base) - GOLDEN[f"base/{base}"]).max() <= 1e-5


@pytest.mark.parametrize("case", THEIRS)
def test_theirs(case: str) -> None:
    adapter = ps.load_adapter(ROOT / "theirs" / case, allow_pickle=True)
    live = ps.inject(model(case), adapter)
    assert np.abs(output(live, case) - GOLDEN[f"theirs/{case}"]).max() <= 1e-5


@pytest.mark.parametrize("name", CASES)
def test_ours_are_what_their_library_was_given(name: str, tmp_path: Path) -> None:
    """What is written today is, byte for byte, what AdapterHub's library loaded: its outputs are for this code."""
    made, stored = write(name, tmp_path / name), ROOT / "ours" / name
    files = sorted(file.relative_to(made) for file in made.rglob("*") if file.is_file())
    assert files == sorted(file.relative_to(stored) for file in stored.rglob("*") if file.is_file())
    assert [file for file in files if (made / file).read_bytes() != (stored / file).read_bytes()] == []


@pytest.mark.parametrize("name", CASES)
def test_their_library_computes_the_same_with_ours(name: str) -> None:
    case = CASES[name]
    for adapter in (case.adapter, ps.load_adapter(ROOT / "ours" / name)):
        live = ps.inject(case.model(), adapter)
        assert np.abs(output(live, case.base) - GOLDEN[f"ours/{name}"]).max() <= 1e-5


@pytest.mark.parametrize("name", CASES)
def test_ours_come_back(name: str) -> None:
    loaded, adapter = ps.load_adapter(ROOT / "ours" / name), CASES[name].adapter
    mine, theirs = dict(adapter.tensors()), dict(loaded.tensors())
    bare = {key.removeprefix(f"{adapter.model_type}."): value for key, value in theirs.items()}
    assert sum(value.numel() for value in mine.values()) == sum(value.numel() for value in bare.values())
    assert (loaded.reading, loaded.model_type) == (adapter.reading, adapter.model_type)
