"""Graphs for CUDA: larger operators in the place of many, the same text, every one with a kernel there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from peftsurgery.graph import weights
from peftsurgery.graph.export import trace
from peftsurgery.graph.fusions import counts
from peftsurgery.graph.placement import placed
from peftsurgery.graph.session import Session
from peftsurgery.graph.signature import signature
from peftsurgery.live.precision import convert
from tests.reference.test_export_decoders import CASES, SIZES, TOLERANCE, Steps, text, torch_says
from tests.reference.test_precision import near
from tests.subjects import transformer

FUSED: Mapping[str, Mapping[str, int]] = {
    "MistralForCausalLM": {"Attention": 2, "RMSNormalization": 5, "RotaryEmbedding": 4},
    "GPTNeoXForCausalLM": {"Attention": 2, "RotaryEmbedding": 4, "LayerNormalization": 5, "Gelu": 2},
    "Gemma2ForCausalLM": {"RMSNormalization": 9, "RotaryEmbedding": 4, "Gelu": 2},
    "FalconForCausalLM": {"Attention": 2, "RotaryEmbedding": 4, "LayerNormalization": 3, "Gelu": 2},
}
"""What stands for many in two layers; Gemma 2 caps its scores, and no rule knows that form."""
HALVES = {"Gemma2ForCausalLM": torch.bfloat16, "LlamaForCausalLM": torch.float16}


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_decoder_reads_as_torch_does_and_has_its_kernels(name: str, tmp_path: Path) -> None:
    model = transformer(name, {**SIZES, **CASES[name]}, spread=0.1)
    graph = trace(model, signature(model), fuse=True)
    assert counts(graph) == FUSED[name]
    assert placed(graph).lost == ()
    assert {parameter for parameter, _ in model.named_parameters()} <= set(graph.graph.initializers)
    steps = Steps(weights.save(graph, tmp_path)[0])
    for rows, pieces in ((1, [1, 1, 1]), (3, [14]), (3, [11, 1, 1, 1]), (2, [8, 6, 1])):
        ids, mask = text(rows, sum(pieces))
        apart = np.abs(steps.run(ids, mask, pieces) - torch_says(model, ids, mask))
        assert apart[mask.astype(bool)].max() <= TOLERANCE, (rows, pieces)


@pytest.mark.parametrize(("name", "dtype"), HALVES.items(), ids=str)
def test_the_norms_of_a_half_are_fused_too(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Gemma's, whose weight is 1 + w in float32, and Llama's, whose weight is of the half."""
    model = transformer(name, {**SIZES, **CASES[name], "num_hidden_layers": 1}, spread=0.1)
    convert(model, dtype)
    graph = trace(model, signature(model), fuse=True)
    norms = [module for module in model.modules() if "RMSNorm" in type(module).__name__]
    assert counts(graph)["RMSNormalization"] == len(norms) and placed(graph).lost == ()
    session = Session(weights.save(graph, tmp_path)[0], ["cpu"], threads=1)
    near(session, model, dtype)
