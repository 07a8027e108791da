"""`--for cuda` on the command line: by reference, with a baked prefix, and where it cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
from click.testing import Result

from peftsurgery.graph import weights

STORIES = Path(__file__).parents[2] / "fixtures" / "stories260k"


def test_weights_in_files_are_fused_around_and_not_read(
    llama: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    words = ("--for", "cuda", "--check-placement", "cuda", "--weights", "reference")
    result = run("export-onnx", llama, "-o", tmp_path / "out", *words)
    assert result.exit_code == 0, result.output
    assert "2 Attention, 5 RMSNormalization, 4 RotaryEmbedding" in result.output
    assert "it ran in float32, from the bfloat16 weights" in result.output
    graph = weights.load(tmp_path / "out" / "model.onnx").graph
    away = [n for n, v in graph.initializers.items() if isinstance(v.const_value, ir.ExternalTensor)]
    assert "model.norm.weight" in away and len(away) == 20


def test_a_baked_prefix_is_fused_too(tmp_path: Path, run: Callable[..., Result]) -> None:
    adapter = STORIES.parent / "stories260k_prefix_proj"
    words = ("--adapter", adapter, "--for", "cuda", "--check-placement", "cuda")
    result = run("export-onnx", STORIES, "-o", tmp_path / "out", *words)
    assert result.exit_code == 0, result.output
    assert "5 Attention, 11 RMSNormalization, 10 RotaryEmbedding" in result.output


def test_an_opset_without_the_operators_is_refused(
    llama: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    result = run("export-onnx", llama, "-o", tmp_path / "out", "--for", "cuda", "--opset", 20)
    assert result.exit_code == 1
    assert "Opset 20 lacks the Attention" in result.output and not (tmp_path / "out").exists()
