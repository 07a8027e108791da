"""`export-onnx`, adapters by reference: what stays an adapter is read in the adapter's own files, like the base's."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification

import peftsurgery as ps
from peftsurgery.graph.inputs import batch
from peftsurgery.graph.session import Session
from peftsurgery.live import pretrained
from peftsurgery.method import Method
from tests.cli.conftest import adapter_for
from tests.cli.test_export_reference import bytes_at, external, no_reflink, raw  # noqa: F401
from tests.output_subjects import FUSION, PFEIFFER, trained
from tests.output_subjects import SUBJECTS as OUTPUTS
from tests.reference.test_export_seq2seq import SMALL_T5

Run = Callable[..., Result]
LORA = ps.LoRA(r=4, lora_alpha=6)
MODELS = {**{subject.name: subject for subject in OUTPUTS}, "t5": SMALL_T5}
CASES: list[tuple[str, Method, str]] = [
    ("bert", FUSION, ""),
    ("t5", LORA, "decoder.block.0.layer.1.EncDecAttention.k,encoder.block.0.layer.0.SelfAttention.q"),
    ("vit", PFEIFFER, ""),
]


def lora_for(model: nn.Module, targets: str) -> ps.Adapter:
    ps.inject(model, replace(LORA, init_lora_weights="gaussian"), targets, name="mine", seed=0)
    with torch.no_grad():
        for parameter in ps.trainable_parameters(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return ps.remove(model)


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]} {case[1].name}")
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A base, and an adapter that stays one in a graph, both in directories."""
    name, method, targets = request.param
    model = MODELS[name].model()
    model.save_pretrained(tmp_path / "base")
    adapter = lora_for(model, targets) if targets else trained(MODELS[name], method, "mine")
    return tmp_path / "base", ps.save_adapter(adapter, tmp_path / "mine")


def test_parameters_are_the_adapters_own_bytes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    report = ps.export_onnx(base, adapters=adapter, factored=True, out=tmp_path / "onnx", weights="reference")
    assert report.facts["parity"]["max_abs_diff"] <= 2e-5
    graphs = sorted((tmp_path / "onnx").glob("*.onnx"))
    found = {name: place for graph in graphs for name, place in external(graph).items()}
    places = [place for place in found.values() if place[0].count("/") > 1]
    known = {raw(t) for file in adapter.rglob("*.safetensors") for t in load_file(file).values()}
    assert {bytes_at(tmp_path / "onnx", place) for place in places} == known
    names = {t.name for graph in graphs for t in onnx.load(graph, load_external_data=False).graph.initializer}
    parameters = {name for name, _ in pretrained.load(base).named_parameters()}
    assert not [n for n in names - found.keys() if "lora_" in n or ".adapters." in n or n in parameters]


@pytest.mark.usefixtures("no_reflink")
def test_a_head_is_in_the_file_too_and_a_training_leaves_the_export_alone(
    run: Run, bert: Path, tmp_path: Path
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    lora = adapter_for(model, "query", tmp_path / "lora", "seq-cls")
    done = run("export-onnx", bert, "--adapter", lora, "--factored", "-o", tmp_path / "onnx", "--json")
    assert done.exit_code == 0, done.output
    file = tmp_path / "onnx" / "weights" / "lora" / "adapter_model.safetensors"
    said = json.loads(done.stdout)
    assert said["files"] == {
        "weights/lora/adapter_model.safetensors": "hard link",
        "weights/model.safetensors": "hard link",
    }
    assert os.path.samefile(file, lora / file.name)
    assert external(tmp_path / "onnx" / "model.onnx")["classifier.weight"][0].startswith("weights/lora/")
    certificate = json.loads((tmp_path / "onnx" / "peftsurgery.json").read_text())
    (adapter,) = certificate["adapters"]
    assert adapter["files"][file.name]["size"] == file.stat().st_size
    before = file.read_bytes()
    save_file({n: t + 1 for n, t in load_file(lora / file.name).items()}, lora / file.name)
    assert file.read_bytes() == before, "safetensors writes a new file"
    moved = (tmp_path / "onnx").rename(tmp_path / "moved")
    assert Session(moved / "model.onnx", ["cpu"]).signature().inputs


def test_two_adapters_by_reference_and_copied_give_the_same(bert: Path, tmp_path: Path) -> None:
    targets = (("a", "query,word_embeddings"), ("b", "query"))
    own = [adapter_for(pretrained.load(bert), words, tmp_path / name) for name, words in targets]
    asked = {"adapters": own, "weight": [0.5, 2], "factored": True}
    report = ps.export_onnx(bert, out=tmp_path / "reference", **asked)
    assert report.facts["parity"]["max_abs_diff"] <= 1e-5
    folders = {Path(file).parent.as_posix() for file in report.facts["files"]}
    assert folders == {"weights", "weights/a", "weights/b"}
    ps.export_onnx(bert, out=tmp_path / "copy", weights="copy", verify=False, **asked)
    one, other = (tmp_path / way / "model.onnx" for way in ("reference", "copy"))
    assert factors(one) == factors(other) and len(factors(one)) == 10
    feeds = batch(np.random.default_rng(0), Session(one, ["cpu"]).signature(), 2, 7)
    expected = Session(other, ["cpu"]).run(feeds)
    for name, value in Session(one, ["cpu"]).run(feeds).items():
        assert np.abs(value - expected[name]).max() <= 1e-5, name


def factors(graph: Path) -> set[str]:
    held = onnx.load(graph, load_external_data=False).graph.initializer
    return {tensor.name for tensor in held if "lora_" in tensor.name}


@pytest.mark.parametrize("why", ["rounded", "live", "beside"])
def test_what_is_in_no_file_as_the_graph_computes_with_it_is_in_the_graph(
    bert: Path, tmp_path: Path, why: str
) -> None:
    base = Path(shutil.copytree(bert, tmp_path / "base"))
    lora = adapter_for(pretrained.load(base), "query", tmp_path / "lora")
    adapter = ps.load_adapter(lora, name="lora") if why == "live" else lora
    dtype, out = "float16" if why == "rounded" else None, base if why == "beside" else tmp_path / "onnx"
    report = ps.export_onnx(base, adapters=adapter, factored=True, dtype=dtype, out=out)
    assert report.facts["parity"]["max_abs_diff"] <= report.facts["parity"]["tolerance"]
    held = onnx.load(out / "model.onnx", load_external_data=False).graph.initializer
    factors = [tensor for tensor in held if "lora" in tensor.name]
    assert factors and not [t for t in factors if t.data_location == onnx.TensorProto.EXTERNAL]
    assert {t.data_type for t in factors} == {
        onnx.TensorProto.FLOAT16 if why == "rounded" else onnx.TensorProto.FLOAT
    }
