"""`export-onnx --adapter LORA`, weights by reference: what the adapter changes is written once, with a merge's bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

import peftsurgery as ps
from peftsurgery.errors import NotReferable, TiedSites, UnclaimedSites
from peftsurgery.live import pretrained
from tests.cli.conftest import adapter_for, digest
from tests.cli.test_export_reference import bytes_at, external

Run = Callable[..., Result]
CHANGED = "weights/changed.safetensors"


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("gpt2")
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=64))
    model.half().save_pretrained(path, max_shard_size="20KB")
    return path


def loaded(base: Path, task: str | None) -> torch.nn.Module:
    if task is not None:
        return AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    return pretrained.load(base)


@pytest.fixture(params=["bert", "gpt2", "llama"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A base and an adapter: a head and an embedding; Conv1D in float16; bfloat16, tied, in shards."""
    targets, task = {
        "bert": ("query,value,word_embeddings", "seq-cls"),
        "gpt2": ("c_attn,c_proj", None),
        "llama": ("all-linear", None),
    }[request.param]
    base = request.getfixturevalue(request.param)
    return base, adapter_for(loaded(base, task), targets, tmp_path / "adapter", task)


@pytest.mark.parametrize("weights", ["reference", "copy"])
def test_the_bits_are_those_of_a_merge(
    run: Run, pair: tuple[Path, Path], tmp_path: Path, weights: str
) -> None:
    """Law 4, for exports: those of the base with an adapter and those of the merged model read the same bytes."""
    base, adapter = pair
    before = digest(base)
    assert run("merge", base, adapter, "-o", tmp_path / "merged").exit_code == 0
    for name, words in (("one", [base, "--adapter", adapter]), ("two", [tmp_path / "merged"])):
        asked = ("--no-verify", "--weights", weights)
        done = run("export-onnx", *words, *asked, "-o", tmp_path / name)
        assert done.exit_code == 0, done.output
    one, two = (external(tmp_path / name / "model.onnx") for name in ("one", "two"))
    assert one.keys() == two.keys() and len(one) >= 10
    for name, place in one.items():
        assert bytes_at(tmp_path / "one", place) == bytes_at(tmp_path / "two", two[name]), name
    assert digest(base) == before


def test_only_what_changes_is_written(run: Run, bert: Path, tmp_path: Path) -> None:
    adapter = adapter_for(loaded(bert, "seq-cls"), "query", tmp_path / "adapter", "seq-cls")
    done = run("export-onnx", bert, "--adapter", adapter, "-o", tmp_path / "onnx", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["form"] == "merged" and said["parity"]["max_abs_diff"] <= 1e-5
    assert said["files"][CHANGED] == "written" and CHANGED in said["weights"]
    queries = {f"bert.encoder.layer.{i}.attention.self.query.weight" for i in (0, 1)}
    assert load_file(tmp_path / "onnx" / CHANGED).keys() == {*queries, "classifier.weight", "classifier.bias"}
    assert sorted(path.name for path in (tmp_path / "onnx" / "weights").iterdir()) == [
        "changed.safetensors",
        "model.safetensors",
    ]
    refused = run("export-onnx", bert, "--adapter", adapter, "-o", bert)
    assert refused.exit_code == 1 and "Name another `-o`" in refused.stderr
    assert not (bert / "model.onnx").exists() and not (bert / "weights").exists()


def test_a_bias_and_a_head_of_another_size(bert: Path, tmp_path: Path) -> None:
    own = BertForSequenceClassification.from_pretrained(bert, num_labels=5)
    own.save_pretrained(tmp_path / "base")
    given = ps.load_adapter(adapter_for(loaded(bert, "seq-cls"), "query", tmp_path / "adapter", "seq-cls"))
    bias = "bert.encoder.layer.1.output.dense.bias"
    adapter = replace(given, replaced={**given.replaced, bias: torch.ones(32)})
    report = ps.export_onnx(tmp_path / "base", adapters=adapter, out=tmp_path / "onnx", weights="reference")
    assert report.facts["parity"]["max_abs_diff"] <= 1e-5
    held = load_file(tmp_path / "onnx" / CHANGED)
    assert torch.equal(held[bias], torch.ones(32)) and held["classifier.bias"].shape == (3,)


def test_adapters_that_cannot_be_merged_leave_nothing(gpt2: Path, llama: Path, tmp_path: Path) -> None:
    tied = adapter_for(loaded(llama, None), "embed_tokens", tmp_path / "tied")
    with pytest.raises(TiedSites, match=r"lm_head\.weight"):
        ps.export_onnx(llama, adapters=tied, out=tmp_path / "no")
    other = adapter_for(loaded(llama, None), "q_proj", tmp_path / "other")
    with pytest.raises(UnclaimedSites, match="Take the base"):
        ps.export_onnx(gpt2, adapters=other, out=tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_twins_that_change_alike_are_written_once(bert: Path, tmp_path: Path) -> None:
    BertForMaskedLM.from_pretrained(bert).save_pretrained(tmp_path / "base")
    table, twin = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
    given = ps.load_adapter(adapter_for(loaded(tmp_path / "base", None), "query", tmp_path / "adapter"))
    new = torch.randn(99, 32)
    adapter = replace(given, replaced={table: new, twin: new})
    report = ps.export_onnx(tmp_path / "base", adapters=adapter, out=tmp_path / "onnx", weights="reference")
    assert report.facts["parity"]["max_abs_diff"] <= 1e-4
    assert [name for name in load_file(tmp_path / "onnx" / CHANGED) if name in (table, twin)] == [table]


def test_a_few_weights_of_another_dtype_are_written(bert: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(bert, tmp_path / "base"))
    held = load_file(base / "model.safetensors")
    odd = {n: t.half() if n.startswith("pooler") else t for n, t in held.items()}
    save_file(odd, base / "model.safetensors", metadata={"format": "pt"})
    report = ps.export_onnx(base, out=tmp_path / "onnx", weights="reference")
    assert report.facts["parity"]["max_abs_diff"] <= 1e-5
    written = load_file(tmp_path / "onnx" / CHANGED)
    assert written.keys() == {"pooler.dense.weight", "pooler.dense.bias"}
    assert all(torch.equal(tensor, odd[name].float()) for name, tensor in written.items())
    save_file({n: t.half() for n, t in held.items()}, base / "model.safetensors", metadata={"format": "pt"})
    said = ps.export_onnx(base, out=tmp_path / "copy").facts["weights"]
    assert said == "copied: Most weights are stored in float16, and the model computes in float32"
    with pytest.raises(NotReferable, match="Most weights"):
        ps.export_onnx(base, out=tmp_path / "no", weights="reference")
