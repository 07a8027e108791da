"""`merge --in-place` and `unmerge` as a person calls them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.cli.conftest import adapter_for, digest

Run = Callable[..., Result]


@pytest.fixture
def adapter(llama: Path, tmp_path: Path) -> Path:
    return adapter_for(AutoModelForCausalLM.from_pretrained(llama), "q_proj,v_proj", tmp_path / "adapter")


def tensors(path: Path) -> dict[str, bytes]:
    """The bytes of every tensor; a new file also says in its header that it is merged."""
    held = (load_file(file) for file in path.glob("*.safetensors"))
    return {name: t.view(torch.uint8).numpy().tobytes() for some in held for name, t in some.items()}


def test_in_place_is_the_merge_and_unmerge_the_base(
    run: Run, llama: Path, adapter: Path, tmp_path: Path
) -> None:
    model, undo = tmp_path / "model", tmp_path / "model.undo"
    shutil.copytree(llama, model)
    before = digest(model)
    assert run("merge", model, adapter, "-o", tmp_path / "out").exit_code == 0
    words = ("merge", model, adapter, "--in-place", "--undo")
    done = run(*words, undo)
    assert done.exit_code == 0, done.output
    now = digest(model)
    AutoModelForCausalLM.from_pretrained(model)
    assert tensors(model) == tensors(tmp_path / "out")
    said, apart = (json.loads((path / "peftsurgery.json").read_text()) for path in (model, tmp_path / "out"))
    assert all(said[word] == apart[word] for word in ("files", "adapters", "tensors", "measured"))
    again = run(*words, undo)
    assert again.exit_code == 0
    assert "merged already" in again.output
    assert run(*words, tmp_path / "other.undo").exit_code == 1
    assert digest(model) == now
    assert run("unmerge", model, "--undo", undo).exit_code == 0
    assert digest(model) == before
    assert "Nothing to undo" in run("unmerge", model, "--undo", undo).output


@pytest.mark.parametrize(
    "words",
    [("--in-place",), ("--undo", "u"), ("--in-place", "--undo", "u", "--dtype", "float32")],
    ids=["no undo", "no in-place", "dtype"],
)
def test_what_is_not_in_place_is_refused(
    run: Run, llama: Path, adapter: Path, words: tuple[str, ...]
) -> None:
    before = digest(llama)
    assert run("merge", llama, adapter, *words).exit_code == 1
    assert digest(llama) == before
