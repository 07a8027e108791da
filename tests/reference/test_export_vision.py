"""Image models and CLIP's towers as ONNX: ONNX Runtime agrees with torch, with every kind of adapter on them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import peftsurgery as ps
from peftsurgery.cli import main
from tests.subjects import transformer

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
IMAGE = {**SIZES, "image_size": 8, "patch_size": 4, "num_labels": 5, "projection_dim": 16}
TEXT = {
    **{**SIZES, "vocab_size": 101, "max_position_embeddings": 40, "projection_dim": 16},
    **{"bos_token_id": 99, "eos_token_id": 100},
}
SWIN = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 4],
    "window_size": 4,
}
HIDDEN = ("last_hidden_state", "pooler_output")


@dataclass(frozen=True)
class Case:
    name: str
    outputs: tuple[str, ...]
    sizes: tuple[tuple[str, Any], ...] = tuple(IMAGE.items())

    def model(self) -> nn.Module:
        return transformer(self.name, dict(self.sizes))

    def __str__(self) -> str:
        return self.name


CASES = (
    Case("ViTForImageClassification", ("logits",)),
    Case("ViTModel", HIDDEN),
    Case("CLIPVisionModel", HIDDEN),
    Case("CLIPVisionModelWithProjection", ("image_embeds", "last_hidden_state")),
    Case("CLIPTextModel", HIDDEN, tuple(TEXT.items())),
    Case("CLIPTextModelWithProjection", ("text_embeds", "last_hidden_state"), tuple(TEXT.items())),
    Case("DeiTForImageClassification", ("logits",)),
    Case("BeitForImageClassification", ("logits",)),
    Case("SwinForImageClassification", ("logits",), tuple(SWIN.items())),
    Case("Dinov2Model", HIDDEN),
)


def trained(model: nn.Module, method: ps.Method, targets: str) -> ps.Adapter:
    """An adapter that moves the outputs; the model is as before."""
    ps.inject(model, method, targets, seed=0)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in ps.trainable_parameters(model).values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=noise))
    return ps.remove(model)


def pixels(rows: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, 3, 8, 8)).astype(np.float32)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_exports_agree_with_torch(case: Case, tmp_path: Path) -> None:
    report = ps.export_onnx(case.model(), out=tmp_path / "onnx", check_placement="cuda")
    assert tuple(report.facts["outputs"]) == case.outputs
    assert report.facts["parity"]["max_abs_diff"] <= 1e-4
    held = {port.name: port.shape for port in _session(tmp_path / "onnx").get_inputs()}
    assert all(shape[0] == "batch_size" for shape in held.values())


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[4]], ids=str)
def test_halves_for_cuda_agree_and_run_there(case: Case, tmp_path: Path) -> None:
    words = {"dtype": "float16", "target": "cuda", "check_placement": "cuda"}
    report = ps.export_onnx(case.model(), out=tmp_path / "onnx", **words)
    assert report.facts["operators"]["model.onnx"]["Attention"] == 2
    assert report.facts["parity"]["accepted"]["why"] == "8 steps of float16"


@pytest.mark.parametrize(
    ("method", "targets", "factored"),
    [
        (ps.LoRA(r=3), r"re:.*(q_proj|v_proj|fc1|projection|patch_embedding)", False),
        (ps.LoRA(r=3), "q_proj,v_proj,mlp.fc1", True),
        (ps.Bottleneck(bottleneck_size=4, non_linearity="gelu"), "mh_adapter,output_adapter", False),
    ],
)
@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=str)
def test_adapters_move_the_graph_as_they_move_the_model(
    case: Case, method: ps.Method, targets: str, factored: bool, tmp_path: Path
) -> None:
    model = case.model()
    adapter = trained(model, method, targets)
    image = pixels(3)
    with torch.no_grad():
        before = model(torch.from_numpy(image))[0].numpy()
    ps.export_onnx(model, adapters=adapter, factored=factored, out=tmp_path / "onnx")
    with torch.no_grad():
        expected = ps.inject(model, adapter).eval()(torch.from_numpy(image))[0].numpy()
    session = _session(tmp_path / "onnx")
    (found,) = session.run([case.outputs[0]], {"pixel_values": image})
    assert np.abs(found - expected).max() <= 1e-4 < 1e-2 < np.abs(expected - before).max()
    factors = [name for name in _initializers(tmp_path / "onnx") if "lora_A" in name]
    assert bool(factors) == factored


def test_a_directory_travels_with_its_processor_and_can_be_verified(tmp_path: Path) -> None:
    model, source, out = CASES[0].model(), tmp_path / "vit", tmp_path / "onnx"
    model.save_pretrained(source)
    (source / "preprocessor_config.json").write_text('{"size": 8}')
    adapter = ps.save_adapter(trained(model, ps.LoRA(r=2), "q_proj,v_proj"), tmp_path / "adapter")
    run = CliRunner().invoke
    done = run(main, ["export-onnx", str(source), "--adapter", str(adapter), "-o", str(out), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["outputs"] == ["logits"]
    assert (out / "preprocessor_config.json").read_text() == '{"size": 8}'
    words = ["verify", str(out), "--against", str(source)]
    assert run(main, [*words, "--adapter", str(adapter)]).exit_code == 0
    assert run(main, words).exit_code == 1


def test_weights_by_reference(tmp_path: Path) -> None:
    CASES[0].model().save_pretrained(tmp_path / "vit")
    report = ps.export_onnx(tmp_path / "vit", out=tmp_path / "onnx", weights="reference")
    assert report.facts["parity"]["max_abs_diff"] <= 1e-4


def _session(directory: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(directory / "model.onnx", providers=["CPUExecutionProvider"])


def _initializers(directory: Path) -> set[str]:
    from peftsurgery.graph import weights

    return set(weights.load(directory / "model.onnx").graph.initializers)
