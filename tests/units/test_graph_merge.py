"""Folding in a graph is folding the torch weights, bit for bit; what fails leaves the graph as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

import onnx_ir as ir
import pytest
import torch
from transformers import BertForMaskedLM

import peftsurgery as ps
from peftsurgery.adapter import Adapter, rebased
from peftsurgery.errors import MismatchedTensors, NonFiniteWeight, TiedSites, UnclaimedSites
from peftsurgery.events import Event
from peftsurgery.graph import weights
from peftsurgery.graph.export import trace
from peftsurgery.graph.merge import merge, tensors
from peftsurgery.graph.signature import signature
from peftsurgery.graph.sites import sites
from tests.units.graphs import CONFIG, bert

SCRATCH = TemporaryDirectory()
TARGETS = "query,value,intermediate.dense,word_embeddings"


@cache
def traced(dtype: torch.dtype) -> ir.Model:
    model = bert(dtype)
    return trace(model, signature(model))


@cache
def saved(dtype: torch.dtype, inline: int) -> Path:
    return weights.save(traced(dtype), Path(mkdtemp(dir=SCRATCH.name)), inline=inline)[0]


@cache
def adapter(seed: int = 0, name: str = "a") -> Adapter:
    """A LoRA with a head of its own."""
    model = ps.inject(bert(), ps.LoRA(r=4, lora_alpha=8), TARGETS, name=name, task="token-cls", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in ps.trainable_parameters(model).values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return ps.remove(model, name)


def fitted(graph: ir.Model, given: Adapter) -> Adapter:
    return rebased(given, sites(graph), graph.graph.initializers)[0]


def held(graph: ir.Model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors(graph)}


@pytest.mark.parametrize("inline", [0, weights.INLINE], ids=["external", "inline"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_same_bits_as_in_torch(dtype: torch.dtype, inline: int) -> None:
    graph, model = weights.load(saved(dtype, inline)), bert(dtype)
    before, events = held(graph), list[Event]()
    assert adapter().replaced.keys() == {"classifier.weight", "classifier.bias"}
    merge(graph, [fitted(graph, adapter())], listen=events.append)
    ps.merge(model, adapter())
    after, changed = held(graph), 0
    for name, parameter in model.named_parameters():
        found = after[name] if after[name].shape == parameter.shape else after[name].t()
        exact = parameter if name not in turned(graph) else parameter.t()
        assert torch.equal(after[name], exact), name
        assert found.dtype is dtype
        changed += not torch.equal(after[name], before[name])
    assert changed == len(events) == len(adapter().plan.steps) + 2


def turned(graph: ir.Model) -> set[str]:
    names = {name for name, value in graph.graph.initializers.items() if "transposed" in value.metadata_props}
    assert "classifier.weight" in names
    return names


def test_two_adapters_are_one_rounding() -> None:
    graph, model = weights.load(saved(torch.bfloat16, weights.INLINE)), bert(torch.bfloat16)
    both = [adapter(), replace(adapter(1, "b"), replaced={})]
    merge(graph, [fitted(graph, one) for one in both])
    ps.merge(model, both)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(held(graph)[name].t(), dict(model.named_parameters())[name])


def _nan(given: Adapter) -> Adapter:
    last = given.plan.steps[-1].site.name
    spoilt = {name: tensor * float("nan") for name, tensor in given.params[last].items()}
    return replace(given, params={**given.params, last: spoilt})


def _other_head(given: Adapter) -> Adapter:
    return replace(given, replaced={"classifier.weight": torch.ones(7, 32)})


def _lost_head(given: Adapter) -> Adapter:
    return replace(given, replaced={"score.weight": torch.ones(3, 32)})


@pytest.mark.parametrize(
    ("spoil", "error"),
    [(_nan, NonFiniteWeight), (_other_head, MismatchedTensors), (_lost_head, UnclaimedSites)],
)
def test_what_fails_changes_nothing(spoil: Callable[[Adapter], Adapter], error: type[Exception]) -> None:
    graph = weights.load(saved(torch.float32, weights.INLINE))
    before = held(graph)
    with pytest.raises(error):
        merge(graph, [spoil(fitted(graph, adapter()))])
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(graph))


def test_a_tied_embedding_is_not_folded_behind_its_twins_back(tmp_path: Path) -> None:
    model = BertForMaskedLM(CONFIG)
    weights.save(trace(model, signature(model)), tmp_path, inline=0)
    graph = weights.load(tmp_path / "model.onnx")
    before = held(graph)
    with pytest.raises(TiedSites, match=r"'cls\.predictions\.decoder\.weight'.*--untie") as caught:
        merge(graph, [fitted(graph, replace(adapter(), replaced={}))])
    assert caught.value.names[0] == "bert.embeddings.word_embeddings.weight"
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(graph))
