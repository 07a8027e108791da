"""Tracing leaves the model as it was, and the graph without a trace of the exporter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from transformers import BertForSequenceClassification

import peftsurgery as ps
from peftsurgery.errors import ExportError, UnsupportedModel
from peftsurgery.graph import parity, weights
from peftsurgery.graph.export import trace
from peftsurgery.graph.session import Session
from peftsurgery.graph.signature import signature
from peftsurgery.live.active import canonical_name
from tests.units.graphs import CONFIG, bert


def test_factors_are_initializers_and_the_model_is_left_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = ps.inject(
        bert(), ps.LoRA(r=4, lora_dropout=0.5), "query,word_embeddings", name="a", task="token-cls"
    )
    with torch.no_grad():
        for parameter in ps.trainable_parameters(model).values():
            parameter.add_(0.1)
    model.train()
    modes = [module.training for module in model.modules()]
    state = {name: (id(p), p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    said = signature(model)
    graph = trace(model, said, names=lambda name: canonical_name(model, name))
    assert capfd.readouterr() == ("", "")
    assert modes == [module.training for module in model.modules()]
    assert model.config._attn_implementation == "sdpa"
    for name, parameter in model.named_parameters():
        identity, grad, value = state[name]
        assert (id(parameter), parameter.requires_grad) == (identity, grad) and torch.equal(parameter, value)

    weights.save(graph, tmp_path)
    stored = {
        tensor.name: tuple(tensor.dims) for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer
    }
    query = "bert.encoder.layer.0.attention.self.query"
    assert stored[f"{query}.weight"] == (32, 32)
    assert stored[f"{query}.a.lora_A.weight"] == (32, 4), "stored as MatMul reads it"
    assert stored["bert.embeddings.word_embeddings.a.lora_embedding_B"] == (4, 32)
    assert "classifier.weight" in stored and not any(".base" in name for name in stored)
    session = Session(tmp_path / "model.onnx", ["cpu"])
    assert session.signature() == said
    found = parity.compare(session, parity.torch_runner(model, said), said)
    assert parity.check(found).provider == "CPUExecutionProvider"


def test_the_file_says_who_wrote_it_and_no_more(tmp_path: Path) -> None:
    model = bert()
    weights.save(trace(model, signature(model)), tmp_path)
    proto = onnx.load(tmp_path / "model.onnx")
    assert (proto.producer_name, proto.producer_version) == ("peftsurgery", ps.__version__)
    assert {e.domain: e.version for e in proto.opset_import} == {"": 24}
    assert not any(node.metadata_props or node.doc_string for node in proto.graph.node)
    held = {tensor.name for tensor in proto.graph.initializer}
    assert {value.name for value in proto.graph.value_info} <= held and not proto.functions
    assert __file__.rsplit("/", 1)[0].encode() not in proto.SerializeToString()


def test_the_attention_is_put_back_when_tracing_fails() -> None:
    class Moody(BertForSequenceClassification):
        def forward(
            self, input_ids: Any, attention_mask: Any = None, token_type_ids: Any = None, **rest: Any
        ) -> Any:
            if input_ids.sum().item() == 0:
                raise ValueError
            return super().forward(input_ids, attention_mask, token_type_ids, **rest)

    model = Moody(CONFIG).train()
    said = signature(model, "seq-cls")
    with pytest.raises(UnsupportedModel, match=r"cannot trace Moody to opset 24: .*data-dependent"):
        trace(model, said)
    assert model.training and model.config._attn_implementation == "sdpa"


def test_a_mask_that_the_model_does_not_read_is_an_error() -> None:
    class Deaf(BertForSequenceClassification):
        def forward(self, input_ids: Any, attention_mask: Any = None, **rest: Any) -> Any:
            return super().forward(input_ids, **rest)

    model = Deaf(CONFIG)
    with pytest.raises(ExportError, match="ignores attention_mask"):
        trace(model, signature(model, "seq-cls"))


def test_two_parameters_of_one_name_are_an_error() -> None:
    model = bert()
    with pytest.raises(ExportError, match="named 'weight'"):
        trace(model, signature(model), names=lambda name: name.rsplit(".", 1)[-1])
