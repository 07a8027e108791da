"""generate: the text of an exported decoder, piece by piece."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from click.testing import Result
from safetensors.torch import save_file

from peftsurgery.commands.generate import _prefix

Run = Callable[..., Result]
STORIES = Path(__file__).parents[2] / "fixtures" / "stories260k"


def test_a_text_on_the_command_line(run: Run, tmp_path: Path) -> None:
    onnx = tmp_path / "onnx"
    assert run("export-onnx", STORIES, "-o", onnx).exit_code == 0
    golden = (STORIES / "golden_greedy.txt").read_text()
    shown = run("generate", onnx, "--prompt", "Once upon a time", "--max-new-tokens", 40).stdout
    text, _, rest = shown.partition("\n40 tokens in ")
    assert golden.startswith("Once upon a time" + text) and len(text) > 60 and "tokens/s" in rest
    words = ("--prompt", "One day", "--prompt", "The cat", "--max-new-tokens", 5, "--json")
    drawn = [
        json.loads(run("generate", onnx, *words, "--temperature", 1, "--seed", seed).stdout)["texts"]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [row["prompt"] for row in drawn[0]] == ["One day", "The cat"]


def test_a_prefix_in_half_precision_is_read(tmp_path: Path) -> None:
    """numpy has no bfloat16, which `export-onnx --prefix file --dtype bfloat16` writes."""
    save_file({"prefix.0.key": torch.full((2, 3, 4), 1.5).bfloat16()}, tmp_path / "prefix.safetensors")
    found = _prefix(tmp_path / "prefix.safetensors")
    assert found is not None and found["prefix.0.key"].tolist() == np.full((2, 3, 4), 1.5).tolist()
