"""`peftsurgery.json` and the graph's own metadata: what went into an export, and what was compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import onnx
from click.testing import Result
from transformers import AutoModel

import peftsurgery as ps
from peftsurgery.adapter import fingerprint
from peftsurgery.graph.session import Session
from tests.cli.conftest import adapter_for, digest

Run = Callable[..., Result]


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def noted(graph: Path) -> dict[str, str]:
    held = onnx.load(graph, load_external_data=False).metadata_props
    return {entry.key.removeprefix("peftsurgery."): entry.value for entry in held}


def test_what_went_in_and_what_came_out(run: Run, bert: Path, tmp_path: Path) -> None:
    adapter, out = adapter_for(AutoModel.from_pretrained(bert), "query", tmp_path / "a"), tmp_path / "onnx"
    words = (bert, "--adapter", adapter, "--weight", 0.5, "-o", out, "--hash", "--json")
    report = json.loads(run("export-onnx", *words).stdout)
    said = json.loads((out / "peftsurgery.json").read_text())
    assert said["graphs"]["model.onnx"]["sha256"] == sha256(out / "model.onnx")
    assert said["base"]["name"] == bert.name
    assert said["base"]["files"]["config.json"]["sha256"] == sha256(bert / "config.json")
    assert said["base"]["files"]["model.safetensors"]["sha256"] == sha256(bert / "model.safetensors")
    assert said["adapters"][0]["weight"] == 0.5
    assert said["adapters"][0]["files"]["adapter_model.safetensors"]["sha256"] == sha256(
        adapter / "adapter_model.safetensors"
    )
    (changed,) = said["weights"]
    assert said["weights"][changed]["sha256"] == sha256(out / changed)
    assert said["parity"] == report["parity"] and said["dtype"] == "float32" and said["opset"] == 24
    assert len(said["not_verified"]) == 1 and said["parity"]["provider"] in said["not_verified"][0]
    note = noted(out / "model.onnx")
    assert (note["form"], note["adapters"], note["base"]) == ("merged", adapter.name, bert.name)
    assert float(note["tolerance"]) == said["parity"]["tolerance"] >= said["parity"]["max_abs_diff"]
    assert Session(out / "model.onnx", ["cpu"]).signature().task == note["task"]


def test_what_is_not_known_is_said(bert: Path, tmp_path: Path) -> None:
    live = AutoModel.from_pretrained(bert)
    adapter = ps.load_adapter(adapter_for(AutoModel.from_pretrained(bert), "query", tmp_path / "a"))
    ps.export_onnx(live, adapters=adapter, out=tmp_path / "onnx", verify=False)
    said = json.loads((tmp_path / "onnx" / "peftsurgery.json").read_text())
    assert said["base"] == {"name": "BertModel", "files": {}} and said["parity"] is None
    assert said["weights"].keys() == {"model.onnx.data"}
    (one,) = said["adapters"]
    assert one["fingerprint"] == fingerprint(adapter) and not one["files"]
    told = " | ".join(said["not_verified"])
    for word in ("live model", "comparison was left out", "not by every byte"):
        assert word in told
    assert "tolerance" not in noted(tmp_path / "onnx" / "model.onnx")


def test_the_same_export_twice_is_the_same_bytes(bert: Path, tmp_path: Path) -> None:
    adapter = adapter_for(AutoModel.from_pretrained(bert), "query,value", tmp_path / "adapter")
    for out in ("one", "two"):
        ps.export_onnx(bert, adapters=adapter, out=tmp_path / out)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    assert "changed.safetensors" in digest(tmp_path / "one")
