"""Exports of models whose parameters are not in the checkpoint as such: transformers computes them on loading."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2Model, MixtralConfig, MixtralForCausalLM

import peftsurgery as ps
from peftsurgery.commands.assembled_weights import parts
from peftsurgery.disk.checkpoint import open_checkpoint
from peftsurgery.errors import NotReferable
from peftsurgery.live import pretrained
from tests.cli.conftest import adapter_for
from tests.cli.test_export_reference import bytes_at, external, raw
from tests.subjects import transformer

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MIXTRAL = {"num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 99, "num_local_experts": 4}


def dino() -> torch.nn.Module:
    return Dinov2Model(Dinov2Config(**SMALL, image_size=28, patch_size=14, use_swiglu_ffn=True))


def mixtral() -> torch.nn.Module:
    return MixtralForCausalLM(MixtralConfig(**SMALL, **MIXTRAL))


def experts() -> torch.nn.Module:
    words = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}
    return transformer(
        "Qwen3MoeForCausalLM", {**SMALL, **words, "num_key_value_heads": 2, "vocab_size": 1999}
    )


@pytest.mark.parametrize("made", [dino, mixtral], ids=["split", "stacked"])
def test_parts_are_what_transformers_loads(made: object, tmp_path: Path) -> None:
    made().save_pretrained(tmp_path, max_shard_size="40KB")
    checkpoint, live = open_checkpoint(tmp_path), dict(pretrained.load(tmp_path).named_parameters())
    assert live.keys() - checkpoint.tensors.keys()
    found = parts(pretrained.skeleton(tmp_path), checkpoint.tensors)
    assert len(found) >= 4
    for name, part in found.items():
        assert part.shape == tuple(live[name].shape)
        assert torch.equal(part.make(), live[name]), name


def test_what_is_assembled_is_written_and_the_rest_referred_to(tmp_path: Path) -> None:
    dino().save_pretrained(tmp_path / "base")
    adapter = adapter_for(pretrained.load(tmp_path / "base"), "q_proj", tmp_path / "adapter")
    out = tmp_path / "onnx"
    report = ps.export_onnx(tmp_path / "base", adapters=adapter, out=out, weights="reference")
    assert report.facts["parity"]["max_abs_diff"] <= 1e-4
    written = {n for f, way in report.facts["files"].items() if way == "written" for n in load_file(out / f)}
    assert {name.rsplit(".", 2)[-2] for name in written} == {"gate_proj", "up_proj", "q_proj"}
    live, held = dict(pretrained.load(tmp_path / "base").named_parameters()), external(out / "model.onnx")
    for name in held.keys() & written:
        if "q_proj" not in name:
            assert bytes_at(out, held[name]) == raw(live[name]), name


def test_experts_are_read_one_by_one_as_they_are_stored(tmp_path: Path) -> None:
    experts().save_pretrained(tmp_path / "base")
    report = ps.export_onnx(tmp_path / "base", out=tmp_path / "onnx", weights="reference")
    assert report.facts["parity"]["max_abs_diff"] <= 1e-4
    graph = ir.load(tmp_path / "onnx" / "model.onnx").graph
    stacks = [value for name, value in graph.initializers.items() if ".experts." in name]
    assert len(stacks) == 4
    for stack in stacks:
        assert [node.op_type for node, _ in stack.uses()] == ["Gather"], "nothing writes it again"
        assert all(node.graph is not graph for node, _ in stack.uses())


def test_experts_of_bfloat16_and_how_the_model_stood(tmp_path: Path) -> None:
    model = experts().bfloat16()
    model.set_experts_implementation("eager")
    report = ps.export_onnx(model, out=tmp_path / "onnx", dtype="bfloat16")
    assert report.facts["parity"]["max_abs_diff"] <= report.facts["parity"]["tolerance"]
    assert model.get_experts_implementation() == {"": "eager"}


def test_an_adapter_on_what_is_assembled(tmp_path: Path) -> None:
    dino().save_pretrained(tmp_path / "base")
    adapter = adapter_for(pretrained.load(tmp_path / "base"), "gate_proj", tmp_path / "adapter")
    with pytest.raises(NotReferable, match="changed by an adapter"):
        ps.export_onnx(tmp_path / "base", adapters=adapter, out=tmp_path / "no", weights="reference")
    report = ps.export_onnx(tmp_path / "base", adapters=adapter, out=tmp_path / "onnx")
    assert report.facts["weights"].startswith("copied: ") and "assembles it" in report.facts["weights"]
    assert report.facts["parity"]["max_abs_diff"] <= 1e-4
