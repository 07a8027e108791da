"""`export-onnx`, `verify`, and `merge` of a graph, as a person runs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import Result
from transformers import AutoModelForSequenceClassification

import peftsurgery as ps
from peftsurgery.errors import ParityError
from peftsurgery.graph import passes, weights
from tests.cli.conftest import adapter_for, digest

STORIES = Path(__file__).parents[2] / "fixtures" / "stories260k"
Run = Callable[..., Result]


@pytest.fixture
def adapter(bert: Path, tmp_path: Path) -> Path:
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    return adapter_for(model, "query,value,word_embeddings", tmp_path / "adapter")


def names(graph: Path) -> set[str]:
    return {tensor.name for tensor in onnx.load(graph, load_external_data=False).graph.initializer}


def tensors(graph: Path) -> dict[str, torch.Tensor]:
    held = weights.load(graph).graph.initializers
    return {name: passes.as_torch(value.const_value) for name, value in held.items()}


@pytest.mark.parametrize("factored", [False, True])
def test_export_with_an_adapter(run: Run, bert: Path, adapter: Path, tmp_path: Path, factored: bool) -> None:
    before = digest(bert)
    flags = ["--factored"] if factored else []
    result = run("export-onnx", bert, "--adapter", adapter, "-o", tmp_path / "onnx", "--json", *flags)
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["parity"]["max_abs_diff"] <= 1e-4
    assert said["form"] == ("factored" if factored else "merged")
    certificate = json.loads((tmp_path / "onnx" / "peftsurgery.json").read_text())
    assert certificate["parity"] == said["parity"]
    held = names(tmp_path / "onnx" / "model.onnx")
    assert "bert.encoder.layer.0.attention.self.query.weight" in held
    assert ("bert.encoder.layer.1.attention.self.value.adapter.lora_B.weight" in held) == factored
    grafted = ps.inject(
        AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3), ps.load_adapter(adapter)
    )
    ids = np.array([[5, 6, 7, 0], [8, 9, 10, 11]])
    feeds = {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64), "token_type_ids": ids * 0}
    session = onnxruntime.InferenceSession(
        tmp_path / "onnx" / "model.onnx", providers=["CPUExecutionProvider"]
    )
    with torch.no_grad():
        expected = grafted.eval()(**{name: torch.from_numpy(feed) for name, feed in feeds.items()}).logits
    assert np.abs(session.run(["logits"], feeds)[0] - expected.numpy()).max() <= 1e-5
    assert digest(bert) == before


def test_folding_gives_the_same_bits_everywhere(run: Run, bert: Path, adapter: Path, tmp_path: Path) -> None:
    """Law 4: in memory, on disk and in ONNX."""
    assert run("merge", bert, adapter, "-o", tmp_path / "disk").exit_code == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "disk")
    live = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3).eval()
    ps.export_onnx(live, out=tmp_path / "base")
    ps.merge(live, ps.load_adapter(adapter))
    assert all(torch.equal(p, dict(live.named_parameters())[name]) for name, p in model.named_parameters())
    result = run("merge", tmp_path / "base" / "model.onnx", adapter, "-o", tmp_path / "graph")
    assert result.exit_code == 0, result.output
    folded = tensors(tmp_path / "graph" / "model.onnx")
    compared = [name for name, p in live.named_parameters() if name in folded]
    assert len(compared) > 30
    for name in compared:
        p, held = live.get_parameter(name), folded[name]
        assert torch.equal(held if held.shape == p.shape and torch.equal(held, p) else held.t(), p), name
    verified = run("verify", tmp_path / "graph", "--against", bert, "--adapter", adapter)
    assert verified.exit_code == 0, verified.output


def test_verify_tells_when_they_differ(run: Run, bert: Path, adapter: Path, tmp_path: Path) -> None:
    assert run("merge", bert, adapter, "-o", tmp_path / "merged").exit_code == 0
    assert run("export-onnx", tmp_path / "merged", "-o", tmp_path / "onnx").exit_code == 0
    assert run("verify", tmp_path / "onnx", "--against", tmp_path / "merged").exit_code == 0
    assert run("verify", tmp_path / "merged", "--against", bert, "--adapter", adapter).exit_code == 0
    half = run("verify", tmp_path / "onnx", "--against", bert, "--adapter", adapter, "--weight", 0.5)
    assert half.exit_code == 1
    assert "'logits' differs by" in half.stderr
    assert run("verify", tmp_path / "merged", "--against", tmp_path / "onnx").exit_code == 0


def test_a_wrong_export_leaves_nothing(
    bert: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = weights.save

    def damaged(model: object, directory: Path, *names: str, **options: object) -> object:
        value = model.graph.initializers["bert.encoder.layer.0.attention.self.query.weight"]
        value.const_value = passes.as_ir(passes.as_torch(value.const_value) * 1.5, value.name)
        return real(model, directory, *names, **options)

    monkeypatch.setattr(weights, "save", damaged)
    with pytest.raises(ParityError) as caught:
        ps.export_onnx(bert, adapters=adapter, out=tmp_path / "onnx")
    assert caught.value.output == "logits"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_live_model_comes_back_as_it_was(bert: Path, adapter: Path, tmp_path: Path) -> None:
    live = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    before = {name: id(p) for name, p in live.named_parameters()}
    for factored in (False, True):
        ps.export_onnx(
            live, adapters=ps.load_adapter(adapter), out=tmp_path / str(factored), factored=factored
        )
        assert {name: id(p) for name, p in live.named_parameters()} == before
        assert ps.adapters(live) == ()


def test_inspect_says_the_same_of_every_place(run: Run, bert: Path, adapter: Path, tmp_path: Path) -> None:
    assert run("merge", bert, adapter, "-o", tmp_path / "merged").exit_code == 0
    assert run("export-onnx", tmp_path / "merged", "-o", tmp_path / "onnx").exit_code == 0
    words = ("--targets", "query,dense", "--layers-to-transform", "0", "--json")
    disk = json.loads(run("inspect", tmp_path / "merged", *words).stdout)["selected"]
    graph = json.loads(run("inspect", tmp_path / "onnx" / "model.onnx", *words).stdout)["selected"]
    live = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert disk == [
        site.name for site in ps.plan(live, ps.LoRA(), "query,dense", layers_to_transform=0).sites
    ]
    assert sorted(graph) == sorted(disk)
    shown = run("inspect", adapter).stdout
    assert "LoRA(r=4" in shown and "word_embeddings" in shown


def test_a_decoder_has_a_cache_and_is_verified(run: Run, tmp_path: Path) -> None:
    result = run("export-onnx", STORIES, "-o", tmp_path / "onnx", "--json")
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["inputs"][:4] == ["input_ids", "attention_mask", "position_ids", "past_key_values.0.key"]
    assert said["outputs"][-1] == "present.4.value"
    assert {row["past"] for row in said["parity"]["rows"]} == {0, 4, 8, 17, 64}
    shown = run("export-onnx", STORIES, "-o", tmp_path / "again").stdout
    assert "present " in shown and "after 17" in shown and "present.0" not in shown.split("output  ")[-1]
