"""What a merge says of itself: which files, which adapters, how far they moved what; and `verify` holds it to that."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import peftsurgery as ps
from peftsurgery.disk import engines
from peftsurgery.disk.writer import ShardDone
from peftsurgery.errors import CheckpointError
from tests.cli.conftest import adapter_for, digest

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def adapter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = AutoModelForCausalLM.from_pretrained(llama)
    return adapter_for(model, "q_proj,v_proj", tmp_path_factory.mktemp("adapter") / "tuned")


@pytest.fixture
def merged(run: Run, llama: Path, adapter: Path, tmp_path: Path) -> Path:
    assert run("merge", llama, adapter, "-o", tmp_path / "out", "--weight", 0.75).exit_code == 0
    return tmp_path / "out"


def said(path: Path) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads((path / "peftsurgery.json").read_text())
    return found


def weights(path: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in path.glob("*.safetensors") for name, t in load_file(file).items()}


def test_it_says_what_was_merged_into_what(llama: Path, adapter: Path, merged: Path) -> None:
    told = said(merged)
    assert {name: one["size"] for name, one in told["files"].items()} == {
        file.name: file.stat().st_size for file in llama.glob("*.safetensors")
    }
    (one,) = told["adapters"]
    assert (one["name"], one["weight"], list(one["files"])) == ("tuned", 0.75, ["adapter_model.safetensors"])
    assert "lora_alpha=8" in one["methods"][0], "the method is that of the file"
    before, after = weights(llama), weights(merged)
    assert told["tensors"].keys() == {name for name in before if not torch.equal(before[name], after[name])}
    for name, moved in told["tensors"].items():
        assert moved["changed"] == pytest.approx(float((before[name] != after[name]).double().mean()))
        delta = float((after[name].float() - before[name].float()).norm())
        assert moved["delta_norm"] == pytest.approx(delta, rel=0.01)
    assert told["versions"].keys() == {"python", "torch", "transformers"}


def test_it_is_the_same_every_time(
    run: Run, llama: Path, adapter: Path, merged: Path, tmp_path: Path
) -> None:
    shutil.copytree(llama, tmp_path / "elsewhere" / llama.name)
    words = (
        "merge",
        tmp_path / "elsewhere" / llama.name,
        adapter,
        "-o",
        tmp_path / "again",
        "--weight",
        0.75,
    )
    assert run(*words).exit_code == 0
    assert digest(merged) == digest(tmp_path / "again")


def test_files_with_merged_tensors_say_so(llama: Path, adapter: Path, tmp_path: Path) -> None:
    ps.merge(llama, adapter, out=tmp_path / "cut", max_shard_size=1)  # every tensor has a file for itself
    words = {}
    for file in (tmp_path / "cut").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            words[next(iter(opened.keys()))] = opened.metadata()
    touched = said(tmp_path / "cut")["tensors"]
    assert all(("peftsurgery" in word) == (name in touched) for name, word in words.items())
    mark = said(tmp_path / "cut")["adapters"][0]["fingerprint"][:12]
    assert f"{mark} x 1.0" in words[next(iter(touched))]["peftsurgery"]


@pytest.mark.parametrize("in_place", [False, True])
def test_every_byte_is_hashed_where_that_is_asked_for(
    run: Run, llama: Path, adapter: Path, in_place: bool, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    expected = digest(model)
    where = ("--in-place", "--undo", tmp_path / "undo") if in_place else ("-o", tmp_path / "out")
    assert run("merge", model, adapter, *where, "--hash").exit_code == 0
    told = said(model if in_place else tmp_path / "out")
    assert {name: one["sha256"] for name, one in told["files"].items()} == {
        name: value for name, value in expected.items() if name.endswith(".safetensors")
    }
    file = adapter / "adapter_model.safetensors"
    whole = hashlib.sha256(file.read_bytes()).hexdigest()
    assert told["adapters"][0]["files"][file.name]["sha256"] == whole


def test_an_update_that_bf16_cannot_hold_is_told(
    run: Run, llama: Path, adapter: Path, tmp_path: Path
) -> None:
    words = ("merge", llama, adapter, "--weight", 1e-6, "--json", "-o")
    told = json.loads(run(*words, tmp_path / "out").stdout)
    assert told["vanished"] == told["tensors"] and len(told["vanished"]) == 4
    assert json.loads(run(*words, tmp_path / "wide", "--dtype", "float32").stdout)["vanished"] == []


def test_verify_takes_weights_from_it(run: Run, llama: Path, adapter: Path, merged: Path) -> None:
    words = ("verify", merged, "--against", llama, "--bits", "--json", "--adapter", adapter)
    found = run(*words)
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)
    assert (told["weights"], told["identified"]) == ([0.75], True)
    assert run(*words, "--weight", 0.5).exit_code == 1
    assert "'tuned x 0.75'" in run(*words[:-2]).stderr


def test_verify_sees_another_base_of_the_same_shapes(
    run: Run, llama: Path, adapter: Path, merged: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(llama, tmp_path / "other"))
    file = next(iter(other.glob("*.safetensors")))
    save_file({name: t * 2 for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
    words = ("--bits", "--adapter", adapter)
    found = run("verify", merged, "--against", other, *words)
    assert found.exit_code == 1 and "is not the base of" in found.stderr and file.name in found.stderr
    assert ps.merge(other, adapter, out=tmp_path / "wrong") is not None  # merging tells nothing
    assert run("verify", tmp_path / "wrong", "--against", llama, *words).exit_code == 1


def test_verify_sees_another_adapter(run: Run, llama: Path, merged: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    other = adapter_for(model, "q_proj", tmp_path / "later")
    found = run("verify", merged, "--against", llama, "--bits", "--adapter", other)
    assert found.exit_code == 1 and "is none of the adapters" in found.stderr


def test_without_a_word_bits_are_compared_all_the_same(
    run: Run, llama: Path, adapter: Path, merged: Path
) -> None:
    words = ("verify", merged, "--against", llama, "--bits", "--json", "--adapter", adapter)
    file = merged / "peftsurgery.json"
    whole = said(merged)
    export = {"verb": "export-onnx", "model": dict(whole)}
    for text, code in (("{", 1), ("[]", 1), (json.dumps(export), 0)):
        file.write_text(text)
        assert run(*words).exit_code == code  # the weight is not known where nothing is
        assert run(*words, "--weight", 0.75).exit_code == 0
    file.write_text(json.dumps({**whole, "files": {"a": {}}}))
    assert "cannot be understood" in run(*words).stderr


def test_a_base_that_is_written_to_meanwhile_is_refused(
    llama: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    write = engines.write_shard

    def meanwhile(*words: Any) -> ShardDone:
        file = next(iter(base.glob("*.safetensors")))
        file.write_bytes(file.read_bytes())
        return write(*words)

    monkeypatch.setattr(engines, "write_shard", meanwhile)
    with pytest.raises(CheckpointError, match="changed while it was being merged"):
        ps.merge(base, adapter, out=tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["base"]
