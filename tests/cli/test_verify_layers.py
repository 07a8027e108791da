"""`verify --layers` names the layer where an error was planted, in torch and in a graph, in every family."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from click.testing import Result
from torch import nn

import peftsurgery as ps
from peftsurgery.errors import ExportError, ParityError, PlanError
from peftsurgery.graph import layers
from tests.subjects import transformer

Run = Callable[..., Result]
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 101}
WORDS = {**SIZES, "num_hidden_layers": 2, "max_position_embeddings": 96}
T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 1, "num_heads": 4, "vocab_size": 101}


@dataclass(frozen=True)
class Family:
    """A model, its layers in order, the module where an error is planted, and the layer that it is in."""

    name: str
    sizes: dict[str, Any]
    layers: tuple[str, ...]
    planted: str
    named: str

    def model(self) -> nn.Module:
        return transformer(self.name, self.sizes)

    def wrong(self) -> nn.Module:
        """The same with one weight of one module changed."""
        model = self.model()
        with torch.no_grad():
            next(model.get_submodule(self.planted).parameters())[0] += 0.3
        return model

    def __str__(self) -> str:
        return self.name


def listed(name: str, count: int) -> tuple[str, ...]:
    return (f"before {name}.0", *(f"{name}.{index}" for index in range(count)))


FAMILIES = (
    Family(
        "BertForTokenClassification",
        WORDS,
        listed("bert.encoder.layer", 2),
        "bert.encoder.layer.1.output.dense",
        "bert.encoder.layer.1",
    ),
    Family(
        "LlamaForCausalLM",
        {**WORDS, "num_key_value_heads": 2},
        listed("model.layers", 2),
        "model.layers.1.mlp.up_proj",
        "model.layers.1",
    ),
    Family(
        "T5ForConditionalGeneration",
        {**T5, "decoder_start_token_id": 0, "pad_token_id": 0},
        (*listed("encoder.block", 1), *listed("decoder.block", 1)),
        "decoder.block.0.layer.1.EncDecAttention.v",
        "decoder.block.0",
    ),
    Family(
        "ViTForImageClassification",
        {**SIZES, "num_hidden_layers": 2, "image_size": 8, "patch_size": 4, "num_labels": 5},
        listed("vit.layers", 2),
        "vit.layers.1.mlp",
        "vit.layers.1",
    ),
)


def facts(model: Any, against: Any) -> dict[str, Any]:
    """What the report says, of two that differ."""
    with pytest.raises(ParityError) as caught:
        ps.verify(model, against, layers=True, new_tokens=0)
    return dict(caught.value.report.facts)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_the_layer_of_an_error_is_named(family: Family, tmp_path: Path) -> None:
    right, wrong = family.model(), family.wrong()
    assert facts(wrong, right)["parts_first"] == family.named
    ps.export_onnx(wrong, out=tmp_path / "wrong", verify=False)
    found = facts(tmp_path / "wrong", right)
    assert found["parts_first"] == family.named
    assert tuple(layer["name"] for layer in found["layers"]) == family.layers
    reached = family.layers.index(family.named)
    assert all(layer["max_abs_diff"] <= 1e-4 for layer in found["layers"][:reached])
    assert found["layers"][reached]["max_abs_diff"] > 1e-2
    same = ps.verify(tmp_path / "wrong", wrong, layers=True, new_tokens=0)
    assert same.facts["parts_first"] == "nowhere"
    gaps = {layer["name"]: layer["max_abs_diff"] for layer in same.facts["layers"]}
    assert max(gaps.values()) <= 1e-4 and all(gaps[name] > 0 for name in gaps if "before" not in name)


def test_what_is_before_and_behind_the_layers_is_named_too() -> None:
    family = FAMILIES[0]
    right, early, late = (family.model() for _ in range(3))
    with torch.no_grad():
        early.bert.embeddings.LayerNorm.bias += 0.1
        late.classifier.weight += 0.1
    assert facts(early, right)["parts_first"] == "before bert.encoder.layer.0"
    assert facts(late, right)["parts_first"] == "behind bert.encoder.layer.1"


def test_a_layer_that_runs_twice_counts_twice() -> None:
    sizes = {**WORDS, "embedding_size": 16}
    model = transformer("AlbertForTokenClassification", sizes)
    group = "albert.encoder.albert_layer_groups.0"
    report = ps.verify(model, copy.deepcopy(model), layers=True)
    assert [layer["name"] for layer in report.facts["layers"]] == [f"before {group}", group, f"{group}:2"]


def test_on_the_command_line(run: Run, bert: Path, tmp_path: Path) -> None:
    words = ("--task", "feature-extraction")
    assert run("export-onnx", bert, *words, "-o", tmp_path / "onnx").exit_code == 0
    asked = ("verify", tmp_path / "onnx", "--against", bert, *words, "--layers")
    shown = run(*asked)
    assert shown.exit_code == 0, shown.output
    assert "parts_first  nowhere" in shown.stdout and "encoder.layer.1  " in shown.stdout
    said = json.loads(run(*asked, "--json").stdout)
    assert [layer["name"] for layer in said["layers"]] == [*listed("encoder.layer", 2)]
    proto = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False)
    del proto.metadata_props[[prop.key for prop in proto.metadata_props].index(layers.KEY)]
    onnx.save(proto, tmp_path / "onnx" / "model.onnx")
    result = run(*asked)
    assert (result.exit_code, "does not say which of its values" in result.stderr) == (2, True)
    assert run(*asked[:-1]).exit_code == 0
    with pytest.raises(ExportError):
        ps.verify(tmp_path / "onnx", bert, task="feature-extraction", layers=True)


def test_models_without_a_common_layer_are_refused() -> None:
    model = FAMILIES[0].model()
    other = transformer("ElectraForTokenClassification", {**WORDS, "embedding_size": 32})
    with pytest.raises(PlanError, match="no layer of one name"):
        ps.verify(model, other, layers=True)
