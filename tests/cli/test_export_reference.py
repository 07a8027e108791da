"""`export-onnx`, weights by reference: the graph reads the checkpoint's own bytes, and nothing else is written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForTokenClassification,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaForQuestionAnswering,
)

import peftsurgery as ps
from peftsurgery.errors import CheckpointError, NotReferable, ParityError, PlanError
from peftsurgery.graph.session import Session
from tests.cli.conftest import adapter_for, digest

Run = Callable[..., Result]
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 99,
}
DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 99}
MODELS = {
    "bert with tied weights": lambda: BertForMaskedLM(BertConfig(**SMALL)),
    "roberta": lambda: RobertaForQuestionAnswering(RobertaConfig(**SMALL)),
    "distilbert": lambda: DistilBertForTokenClassification(DistilBertConfig(**DISTIL)),
    "modernbert": lambda: ModernBertForMaskedLM(ModernBertConfig(**SMALL, pad_token_id=0)),
}


def saved(model: torch.nn.Module, directory: Path, shard: str = "20KB") -> Path:
    model.save_pretrained(directory, max_shard_size=shard)
    return directory


def external(graph: Path) -> dict[str, tuple[str, int, int]]:
    """Name → file, offset and length of every external initializer."""
    held = onnx.load(graph, load_external_data=False).graph.initializer
    said = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in held
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    return {name: (e["location"], int(e["offset"]), int(e["length"])) for name, e in said.items()}


def bytes_at(directory: Path, place: tuple[str, int, int]) -> bytes:
    file, offset, length = place
    with (directory / file).open("rb") as handle:
        handle.seek(offset)
        return handle.read(length)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture(params=MODELS, scope="module")
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, object]:
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    return saved(model, tmp_path_factory.mktemp("stored")), model


def test_every_initializer_is_the_parameters_bytes(stored: tuple[Path, object], tmp_path: Path) -> None:
    base, model = stored
    before = digest(base)
    report = ps.export_onnx(base, out=tmp_path / "onnx", weights="reference")
    assert report.facts["parity"]["max_abs_diff"] <= 1e-5
    found = external(tmp_path / "onnx" / "model.onnx")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, place in found.items():
        assert bytes_at(tmp_path / "onnx", place) == raw(parameters[name]), name
    assert len(found) == len(set(found.values())) > 10, "no bytes are named twice"
    used = {place[0] for place in found.values()}
    assert {file.split("/")[0] for file in used} == {"weights"}
    assert len(used) > 1 and set(report.facts["files"]) == used
    assert not [
        n
        for n in onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph.node
        if n.op_type == "Transpose" and n.input[0] in found
    ]
    assert digest(base) == before


def test_the_answers_are_torchs_and_the_copys(stored: tuple[Path, object], tmp_path: Path) -> None:
    base, _ = stored
    ps.export_onnx(base, out=tmp_path / "reference", weights="reference", verify=False)
    ps.export_onnx(base, out=tmp_path / "copy", weights="copy", verify=False)
    one, other = (Session(tmp_path / way / "model.onnx", ["cpu"]) for way in ("reference", "copy"))
    ids = np.arange(14, dtype=np.int64).reshape(2, 7) + 3
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    assert one.signature() == other.signature()
    expected = other(feeds)
    for name, value in one(feeds).items():
        assert np.abs(value - expected[name]).max() <= 1e-5


def test_tied_weights_are_one_tensor(tmp_path: Path) -> None:
    base = saved(MODELS["bert with tied weights"](), tmp_path / "base")
    ps.export_onnx(base, out=tmp_path / "onnx", weights="reference")
    graph = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph
    readers = [node.op_type for node in graph.node if "bert.embeddings.word_embeddings.weight" in node.input]
    assert sorted(readers) == ["FusedMatMul", "Gather"]
    assert "cls.predictions.decoder.weight" not in external(tmp_path / "onnx" / "model.onnx")


def rewritten(base: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    tensors = change(load_file(base / "model.safetensors"))
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def test_twins_that_are_both_stored(tmp_path: Path) -> None:
    base = saved(MODELS["bert with tied weights"](), tmp_path / "base", "1GB")
    twin, table = "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"
    rewritten(base, lambda held: {**held, twin: held[table].clone()})
    ps.export_onnx(base, out=tmp_path / "onnx", weights="reference")
    assert twin not in external(tmp_path / "onnx" / "model.onnx")
    rewritten(base, lambda held: {**held, twin: held[table] + 1})
    with pytest.raises(NotReferable, match=r"differ in the checkpoint.*--weights copy"):
        ps.export_onnx(base, out=tmp_path / "two", weights="reference")


def test_old_names_and_a_missing_prefix_are_resolved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**SMALL))
    base = saved(model, tmp_path / "base", "1GB")

    def old(name: str) -> str:
        spelled = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        )
        return spelled.removeprefix("bert.")

    rewritten(base, lambda held: {old(name): tensor for name, tensor in held.items()})
    ps.export_onnx(base, out=tmp_path / "onnx", weights="reference")
    found = external(tmp_path / "onnx" / "model.onnx")
    name = "bert.encoder.layer.1.output.LayerNorm.weight"
    assert bytes_at(tmp_path / "onnx", found[name]) == raw(model.get_parameter(name))


def test_beside_the_checkpoint_two_files_are_added(run: Run, bert: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(bert, tmp_path / "base"))
    before = {file.name: (file.stat().st_mtime_ns, file.stat().st_ino) for file in base.iterdir()}
    content = digest(base)
    done = run("export-onnx", base, "--weights", "reference", "-o", base, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["weights"] == "by reference: the checkpoint's own, untouched"
    assert {file.name for file in base.iterdir()} == {*before, "model.onnx", "peftsurgery.json"}
    assert {n: (s.st_mtime_ns, s.st_ino) for n in before if (s := (base / n).stat())} == before
    assert digest(base).items() >= content.items()
    onnx.checker.check_model(base / "model.onnx")
    assert run("verify", base, "--against", base).exit_code == 0
    again = run("export-onnx", base, "--weights", "reference", "-o", base)
    assert again.exit_code == 1 and "holds 'model.onnx' already" in again.stderr


def test_a_failure_beside_the_checkpoint_leaves_nothing(bert: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(bert, tmp_path / "base"))
    before = digest(base)
    with pytest.raises(ParityError):
        ps.export_onnx(base, out=base, weights="reference", tolerance=0.0)
    assert digest(base) == before and len(list(base.iterdir())) == len(before)


def test_how_a_merged_checkpoint_was_made_is_kept(run: Run, bert: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    adapter = adapter_for(model, "query,value", tmp_path / "adapter")
    merged = tmp_path / "merged"
    assert run("merge", bert, adapter, "-o", merged).exit_code == 0
    made = json.loads((merged / "peftsurgery.json").read_text())
    assert run("export-onnx", merged, "--weights", "reference", "-o", merged).exit_code == 0
    assert json.loads((merged / "peftsurgery.json").read_text())["model"] == made
    (merged / "model.onnx").unlink()
    assert run("export-onnx", merged, "--weights", "reference", "-o", merged).exit_code == 0
    assert json.loads((merged / "peftsurgery.json").read_text())["model"] == made
    against = run("verify", merged, "--against", bert, "--adapter", adapter)
    assert against.exit_code == 0, against.output


@pytest.fixture
def no_reflink(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("peftsurgery.disk.durable._reflinked", lambda source, target: False)
    yield


@pytest.mark.usefixtures("no_reflink")
def test_hard_links_are_said(run: Run, bert: Path, tmp_path: Path) -> None:
    done = run("export-onnx", bert, "-o", tmp_path / "onnx", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert os.path.samefile(bert / "model.safetensors", tmp_path / "onnx" / "weights" / "model.safetensors")
    assert said["files"] == {"weights/model.safetensors": "hard link"}
    assert "onnx's own checker and loader refuse" in said["weights"]
    with pytest.raises(onnx.checker.ValidationError):
        onnx.checker.check_model(tmp_path / "onnx" / "model.onnx")


@pytest.mark.usefixtures("no_reflink")
@pytest.mark.parametrize("cause", ["file system", "cache"])
def test_copies_are_said(
    run: Run, bert: Path, tmp_path: Path, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Path(shutil.copytree(bert, tmp_path / "base"))
    if cause == "cache":
        (base / "model.safetensors").unlink()
        (base / "model.safetensors").symlink_to(bert / "model.safetensors")
        own = run("export-onnx", base, "--weights", "reference", "-o", base)
        assert own.exit_code == 1 and "symbolic link" in own.stderr
        assert not (base / "model.onnx").exists()
    else:

        def refuse(source: Path, target: Path) -> None:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

        monkeypatch.setattr(os, "link", refuse)
    done = run("export-onnx", base, "--weights", "reference", "-o", tmp_path / "onnx", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    reason = "another file system" if cause == "file system" else "symbolic link"
    assert said["files"] == {"weights/model.safetensors": "copy"}
    assert said["weights"].startswith("by reference: copied") and reason in said["weights"]
    copied = tmp_path / "onnx" / "weights" / "model.safetensors"
    assert not copied.is_symlink() and copied.stat().st_nlink == 1
    assert (
        hashlib.sha256(copied.read_bytes()).digest()
        == hashlib.sha256((bert / copied.name).read_bytes()).digest()
    )
    onnx.checker.check_model(tmp_path / "onnx" / "model.onnx")


@pytest.mark.parametrize(
    "method",
    [
        ps.PromptTuning(num_virtual_tokens=5),
        ps.PTuning(num_virtual_tokens=5, encoder_hidden_size=16, encoder_reparameterization_type="LSTM"),
        ps.PrefixTuning(num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=16),
    ],
    ids=["prompt", "p-tuning", "prefix"],
)
def test_tokens_lie_in_the_graph_and_the_base_in_its_file(
    bert: Path, method: ps.PromptTuning, tmp_path: Path
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    ps.inject(model, method, task="seq-cls", seed=0)
    report = ps.export_onnx(bert, adapters=ps.remove(model), out=tmp_path / "onnx", weights="reference")
    assert report.facts["parity"]["max_abs_diff"] <= 1e-5
    held = {
        t.name
        for t in onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph.initializer
    }
    inside = held - external(tmp_path / "onnx" / "model.onnx").keys()
    assert {"classifier.weight", "classifier.bias"} <= inside
    assert ("prompt" if not isinstance(method, ps.PrefixTuning) else "prefix.1.key") in inside
    assert not [name for name in inside if name.startswith("bert.") and name.endswith((".weight", ".bias"))]


def test_a_graph_beside_its_checkpoint_can_be_merged(run: Run, bert: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(bert, tmp_path / "base"))
    adapter = adapter_for(AutoModel.from_pretrained(base), "query,value", tmp_path / "adapter")
    assert run("export-onnx", base, "-o", base).exit_code == 0
    done = run("merge", base / "model.onnx", adapter, "-o", tmp_path / "merged")
    assert done.exit_code == 0, done.output
    assert {place[0] for place in external(tmp_path / "merged" / "model.onnx").values()} == {
        "model.onnx.data"
    }
    verified = run("verify", tmp_path / "merged", "--against", bert, "--adapter", adapter)
    assert verified.exit_code == 0, verified.output


@pytest.mark.parametrize("weights", ["reference", "copy", "inline"])
def test_whatever_holds_the_weights_can_be_merged(run: Run, bert: Path, tmp_path: Path, weights: str) -> None:
    adapter = adapter_for(AutoModel.from_pretrained(bert), "query,value", tmp_path / "adapter")
    asked = ("--weights", weights, "--no-verify")
    assert run("export-onnx", bert, *asked, "-o", tmp_path / "onnx").exit_code == 0
    done = run("merge", tmp_path / "onnx" / "model.onnx", adapter, "-o", tmp_path / "merged")
    assert done.exit_code == 0, done.output
    held = {place[0] for place in external(tmp_path / "merged" / "model.onnx").values()}
    assert held == (set() if weights == "inline" else {"model.onnx.data"})
    verified = run("verify", tmp_path / "merged", "--against", bert, "--adapter", adapter)
    assert verified.exit_code == 0, verified.output


def test_half_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SMALL)).half()
    base = saved(model, tmp_path / "base")
    report = ps.export_onnx(base, out=tmp_path / "onnx", weights="reference")
    assert report.facts["parity"]["max_abs_diff"] <= report.facts["parity"]["tolerance"]
    assert len(external(tmp_path / "onnx" / "model.onnx")) > 30


def test_what_cannot_be_referenced_is_refused(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(NotReferable, match="live model"):
        ps.export_onnx(AutoModel.from_pretrained(bert), out=tmp_path / "no", weights="reference")
    with pytest.raises(PlanError, match="'reference', 'copy' or 'inline'"):
        ps.export_onnx(bert, out=tmp_path / "no", weights="none")
    with pytest.raises(CheckpointError, match=r"lacks 'classifier\.bias'"):
        ps.export_onnx(bert, out=tmp_path / "no", weights="reference", task="seq-cls")
    base = Path(shutil.copytree(bert, tmp_path / "base"))
    rewritten(base, lambda held: {**held, "pooler.dense.bias": torch.zeros(7)})
    with pytest.raises(CheckpointError, match=r"\(7,\).*\(32,\)"):
        ps.export_onnx(base, out=tmp_path / "no", weights="reference")
    assert not (tmp_path / "no").exists()


def test_weights_by_reference_are_the_default_and_copying_is_said(
    run: Run, bert: Path, tmp_path: Path
) -> None:
    done = run("export-onnx", bert, "--no-verify", "-o", tmp_path / "onnx", "--json")
    assert json.loads(done.stdout)["weights"].startswith("by reference: ")
    live = AutoModel.from_pretrained(bert)
    report = ps.export_onnx(live, out=tmp_path / "live", verify=False)
    assert report.facts["weights"] == "copied: A live model's weights lie in no file that a graph could read"
    asked = run("export-onnx", bert, "--no-verify", "--weights", "copy", "-o", tmp_path / "copy", "--json")
    assert json.loads(asked.stdout)["weights"] == "copied"
    for way in ("live", "copy"):
        found = external(tmp_path / way / "model.onnx")
        assert {place[0] for place in found.values()} == {"model.onnx.data"}
        onnx.checker.check_model(tmp_path / way / "model.onnx", full_check=True)
    one, other = ((tmp_path / way / "model.onnx.data").read_bytes() for way in ("live", "copy"))
    assert one == other, "what is read from files is what a loaded model holds"


def test_copying_reads_one_weight_at_a_time(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*words: object, **more: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("peftsurgery.live.pretrained.load", refuse)
    report = ps.export_onnx(bert, out=tmp_path / "onnx", weights="copy", verify=False)
    assert report.facts["weights"] == "copied" and len(external(tmp_path / "onnx" / "model.onnx")) > 10


@pytest.mark.usefixtures("no_reflink")
def test_an_export_moves_and_is_copied(run: Run, bert: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(bert, tmp_path / "the base of all"))
    for file in base.iterdir():
        file.chmod(0o444)
    base.chmod(0o555)
    out = tmp_path / "an export"
    assert run("export-onnx", base, "--no-verify", "-o", out).exit_code == 0
    copied = Path(shutil.copytree(out, tmp_path / "copied"))
    moved = out.rename(tmp_path / "moved there")
    code = "import sys, onnxruntime as o; print(len(o.InferenceSession(sys.argv[1]).get_inputs()))"
    for place in (copied, moved):
        done = subprocess.run(
            [sys.executable, "-c", code, place / "model.onnx"], capture_output=True, text=True
        )
        assert done.stdout.strip() == "3", done.stderr
    base.chmod(0o755)


def test_portable_operators_read_weights_as_they_are_stored(
    stored: tuple[Path, object], tmp_path: Path, no_reflink: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", shutil.copyfile)  # onnx's checker refuses hard links
    base, _ = stored
    report = ps.export_onnx(base, out=tmp_path / "onnx", portable=True)
    assert report.facts["parity"]["max_abs_diff"] <= 1e-5
    onnx.checker.check_model(tmp_path / "onnx" / "model.onnx", full_check=True)
    model = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False)
    assert (
        {node.domain for node in model.graph.node} == {""} == {opset.domain for opset in model.opset_import}
    )
    held = external(tmp_path / "onnx" / "model.onnx")
    readers = {n: {node.op_type for node in model.graph.node if n in node.input} for n in held}
    assert not [name for name, words in readers.items() if "Transpose" in words]
    matrices = [
        tuple(t.dims) for t in model.graph.initializer if readers.get(t.name) == {"Gemm"} and len(t.dims) == 2
    ]
    assert len(matrices) > 8
    shapes = [node for node in model.graph.node if node.op_type == "Reshape"]
    assert len({(node.input[0], node.input[1]) for node in shapes}) == len(shapes), (
        "maps of one x share its matrix"
    )
