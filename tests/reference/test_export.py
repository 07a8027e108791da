"""Encoders as ONNX: ONNX Runtime agrees with torch, and every parameter that counts keeps its name."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

import peftsurgery as ps
from fixtures.minilm import minilm_path
from peftsurgery.adapter import rebased
from peftsurgery.graph import merge, sites, weights
from peftsurgery.graph.export import trace
from peftsurgery.graph.placement import placed
from peftsurgery.graph.signature import signature
from peftsurgery.live.sites import sites as live_sites
from peftsurgery.live.sites import ties as live_ties
from peftsurgery.site import Kind
from tests.subjects import transformer

FIXTURES = Path(__file__).parents[2] / "fixtures"
SCRATCH = TemporaryDirectory()
TOLERANCE = 1e-4
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 101,
    "max_position_embeddings": 96,
}
IDS, TYPES = ("input_ids", "attention_mask"), ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class Case:
    """A class of transformers, what its configuration has of its own, and the ports that people expect."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    own: tuple[tuple[str, Any], ...] = ()

    def model(self) -> nn.Module:
        return transformer(self.name, {**SIZES, **dict(self.own)})

    def __str__(self) -> str:
        return self.name


SMALL_DISTILBERT = (("dim", 32), ("n_layers", 1), ("n_heads", 4), ("hidden_dim", 48))
DEBERTA = (
    ("relative_attention", True),
    ("position_buckets", 8),
    ("pos_att_type", "p2c|c2p"),
    ("norm_rel_ebd", "layer_norm"),
    ("share_att_key", True),
    ("position_biased_input", False),
)
MODERN = (
    ("num_hidden_layers", 2),
    ("local_attention", 8),
    ("pad_token_id", 0),
    ("cls_token_id", 1),
    ("sep_token_id", 2),
    ("bos_token_id", 1),
    ("eos_token_id", 2),
)
CASES = (
    Case("BertModel", TYPES, ("last_hidden_state", "pooler_output")),
    Case("BertForMaskedLM", TYPES, ("logits",)),
    Case("RobertaForSequenceClassification", IDS, ("logits",), (("type_vocab_size", 1), ("num_labels", 3))),
    Case("DistilBertForQuestionAnswering", IDS, ("start_logits", "end_logits"), SMALL_DISTILBERT),
    Case("ElectraForTokenClassification", TYPES, ("logits",), (("embedding_size", 16), ("num_labels", 5))),
    Case("MPNetForSequenceClassification", IDS, ("logits",)),
    Case(
        "AlbertForTokenClassification", TYPES, ("logits",), (("embedding_size", 16), ("num_hidden_layers", 2))
    ),
    Case("DebertaV2ForSequenceClassification", IDS, ("logits",), DEBERTA),
    Case("ModernBertForMaskedLM", IDS, ("logits",), MODERN),
)


@dataclass(frozen=True)
class Exported:
    model: nn.Module
    path: Path
    per_token: dict[str, bool]


@cache
def exported(case: Case) -> Exported:
    model = case.model()
    said = signature(model)
    path = Path(mkdtemp(dir=SCRATCH.name)) / "model.onnx"
    weights.save(trace(model, said), path.parent)
    return Exported(model, path, {port.name: port.per_token for port in said.outputs})


def feeds(names: tuple[str, ...], rows: int, columns: int) -> dict[str, np.ndarray]:
    """Padded on the right, with ids that no architecture here takes for padding."""
    random = np.random.default_rng(rows)
    mask = np.arange(columns) < np.arange(columns, columns - rows, -1)[:, None]
    ids = np.where(mask, random.integers(3, 101, mask.shape), 1)
    types = random.integers(0, 2, mask.shape)
    made = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    return {name: made[name].astype(np.int64) for name in names}


def torch_says(model: nn.Module, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    model.eval()
    with torch.no_grad():
        found = model(**{name: torch.from_numpy(array) for name, array in feed.items()})
    return {name: value.numpy() for name, value in found.items()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_onnx_runtime_agrees_with_torch_at_every_shape(case: Case) -> None:
    export = exported(case)
    onnx.checker.check_model(str(export.path), full_check=True)
    session = onnxruntime.InferenceSession(str(export.path), providers=["CPUExecutionProvider"])
    assert tuple(port.name for port in session.get_inputs()) == case.inputs
    assert tuple(port.name for port in session.get_outputs()) == case.outputs
    assert all(port.shape == ["batch_size", "sequence_length"] for port in session.get_inputs())
    for rows, columns in ((1, 3), (2, 11), (4, 40)):
        feed = feeds(case.inputs, rows, columns)
        expected = torch_says(export.model, feed)
        mask = feed["attention_mask"].astype(bool)
        for name, found in zip(case.outputs, session.run(None, feed), strict=True):
            apart = np.abs(found - expected[name])
            assert found.shape == expected[name].shape
            assert (apart[mask] if export.per_token[name] else apart).max() <= TOLERANCE


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_parameter_that_counts_keeps_its_name(case: Case) -> None:
    export = exported(case)
    held = {tensor.name for tensor in onnx.load(export.path).graph.initializer}
    twins = {name: group for group in live_ties(export.model) for name in group}
    export.model.eval().zero_grad()
    given = {name: torch.from_numpy(array) for name, array in feeds(case.inputs, 3, 9).items()}
    found = export.model(**given)
    sum(found[name].square().sum() for name in case.outputs).backward()
    used = [name for name, parameter in export.model.named_parameters() if parameter.grad is not None]
    assert len(used) > 12
    assert [name for name in used if not held & set(twins.get(name, (name,)))] == []
    assert all(len(held & set(group)) == 1 for group in twins.values()), "a tied weight is one tensor"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_graph_has_the_sites_of_the_model(case: Case) -> None:
    export = exported(case)
    graph = weights.load(export.path)
    found = {site.name: site for site in sites.sites(graph)}
    expected = {site.name: site for site in live_sites(export.model)}
    tied = {name.removesuffix(".weight") for group in sites.ties(graph) for name in group[1:]}
    assert found.keys() == expected.keys() - tied
    assert {frozenset(group) for group in sites.ties(graph)} == {
        frozenset(g) for g in live_ties(export.model)
    }
    for name, site in found.items():
        if name.endswith("rel_embeddings"):  # DeBERTa reads this table without looking rows up in it
            assert site.kind is Kind.OTHER
            continue
        assert site.kind is expected[name].kind
        if site.kind is not Kind.OTHER:
            assert site.matrix_shape == expected[name].matrix_shape


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_node_that_computes_has_a_cuda_kernel(case: Case) -> None:
    found = placed(weights.load(exported(case).path))
    assert found.lost == () and found.device > found.shapes


def test_minilm_with_its_lora_merged_in_the_graph_gives_the_golden_logits(tmp_path: Path) -> None:
    golden = np.load(FIXTURES / "minilm_lora" / "golden.npz")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(minilm_path(), num_labels=2)
    graph = trace(model, signature(model))
    weights.save(graph, tmp_path, name="base.onnx")
    loaded, adapter = weights.load(tmp_path / "base.onnx"), ps.load_adapter(FIXTURES / "minilm_lora")
    fitted, _ = rebased(adapter, sites.sites(loaded), loaded.graph.initializers)
    merge.merge(loaded, [fitted])
    weights.save(loaded, tmp_path)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {name: golden[name] for name in TYPES})
    assert np.abs(logits - golden["logits"]).max() <= TOLERANCE
    assert (logits.argmax(-1) == golden["logits"].argmax(-1)).all()
    merged = dict(merge.tensors(loaded))["bert.encoder.layer.0.attention.self.query.weight"]
    assert np.abs(merged.t().numpy() - golden["merged_layer0_query"]).max() <= 1e-6
