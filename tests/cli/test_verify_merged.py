"""`verify MERGED --against BASE --adapter A --bits`: what a merge wrote is made again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.cli.conftest import adapter_for

Run = Callable[..., Result]


@pytest.fixture
def adapter(llama: Path, tmp_path: Path) -> Path:
    return adapter_for(AutoModelForCausalLM.from_pretrained(llama), "q_proj,v_proj", tmp_path / "adapter")


@pytest.fixture
def merged(run: Run, llama: Path, adapter: Path, tmp_path: Path) -> Path:
    assert run("merge", llama, adapter, "-o", tmp_path / "out").exit_code == 0
    return tmp_path / "out"


def test_what_was_merged_is_proved(run: Run, llama: Path, adapter: Path, merged: Path) -> None:
    result = run("verify", merged, "--against", llama, "--adapter", adapter, "--bits", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert (said["touched"], said["cast"], said["vanished"]) == (4, 0, [])
    before, after = weights(llama), weights(merged)
    assert said["compared"] == len(after)
    for name, told in said["tensors"].items():
        share = (before[name] != after[name]).double().mean()
        assert told["changed"] == pytest.approx(float(share))
        assert told["delta_norm"] == pytest.approx(
            float((after[name] - before[name]).float().norm()), rel=0.01
        )
        assert 0 < told["lost"] < 0.1


def weights(path: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in path.glob("*.safetensors") for name, t in load_file(file).items()}


def test_other_dtypes_and_files_prove_too(run: Run, llama: Path, adapter: Path, tmp_path: Path) -> None:
    assert run("merge", llama, adapter, "-o", tmp_path / "out", "--dtype", "float32").exit_code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "one")
    for place in ("out", "one"):
        words = ("verify", tmp_path / place, "--against", llama, "--adapter", adapter, "--bits", "--json")
        result = run(*words)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["cast"] == json.loads(result.stdout)["compared"]


def test_a_head_and_another_class_prove_too(run: Run, bert: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    adapter = adapter_for(model, "query,dense", tmp_path / "adapter")
    assert run("merge", bert, adapter, "-o", tmp_path / "out").exit_code == 0
    result = run("verify", tmp_path / "out", "--against", bert, "--adapter", adapter, "--bits")
    assert result.exit_code == 0, result.output


def test_an_untied_weight_proves_too(run: Run, llama: Path, tmp_path: Path) -> None:
    adapter = adapter_for(AutoModelForCausalLM.from_pretrained(llama), "lm_head", tmp_path / "adapter")
    assert run("merge", llama, adapter, "-o", tmp_path / "out", "--untie").exit_code == 0
    result = run("verify", tmp_path / "out", "--against", llama, "--adapter", adapter, "--bits")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.q_proj.weight", "model.norm.weight"], ids=["touched", "untouched"]
)
def test_one_bit_is_found(run: Run, llama: Path, adapter: Path, merged: Path, name: str) -> None:
    file = merged / json.loads((merged / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name].view(-1).view(torch.int16)[5] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    result = run("verify", merged, "--against", llama, "--adapter", adapter, "--bits")
    assert (result.exit_code, "1 of " in result.stderr, f"'{name}'" in result.stderr) == (1, True, True)


def test_another_adapter_weight_or_base_is_found(
    run: Run, llama: Path, adapter: Path, merged: Path, tmp_path: Path
) -> None:
    words = ("verify", merged, "--against", llama, "--adapter", adapter)
    assert "4 of" in run(*words, "--weight", 0.5, "--bits").stderr
    assert run(*words, "--weight", 0.5, "--sample", 1).exit_code == 1
    assert run("verify", llama, "--against", llama, "--adapter", adapter, "--bits").exit_code == 1
    other = Path(shutil.copytree(llama, tmp_path / "other"))
    file = next(f for f in other.glob("*.safetensors") if "model.norm.weight" in load_file(f))
    save_file({n: t * 2 for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    assert run("verify", merged, "--against", other, "--adapter", adapter, "--bits").exit_code == 1


def test_a_sample_is_a_sample(run: Run, llama: Path, adapter: Path, merged: Path) -> None:
    words = ("verify", merged, "--against", llama, "--adapter", adapter, "--json", "--sample")
    said = json.loads(run(*words, 2).stdout)
    assert (said["compared"], said["touched"]) == (4, 2)
    assert "--sample 16" in run(*words, 0).stderr


def test_an_update_that_bf16_cannot_hold_is_told(
    run: Run, llama: Path, adapter: Path, tmp_path: Path
) -> None:
    words = (llama, adapter, "--weight", 1e-6)
    assert run("merge", *words, "-o", tmp_path / "out").exit_code == 0
    result = run(
        "verify",
        tmp_path / "out",
        "--against",
        llama,
        "--adapter",
        adapter,
        "--weight",
        1e-6,
        "--bits",
        "--json",
    )
    said = json.loads(result.stdout)
    assert all(told["changed"] < 0.01 and told["lost"] > 0.9 for told in said["tensors"].values())
