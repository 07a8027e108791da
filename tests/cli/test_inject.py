"""`inject MODEL -o ADAPTER`: a fresh adapter that PEFT loads, a dry run, and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from click.testing import Result
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.cli.conftest import digest

Run = Callable[..., Result]


def test_peft_loads_it(run: Run, bert: Path, tmp_path: Path) -> None:
    result = run(
        "inject",
        bert,
        "--targets",
        "query,value",
        "--r",
        4,
        "--alpha",
        8,
        "--task",
        "seq-cls",
        "-o",
        tmp_path / "a",
    )
    assert result.exit_code == 0, result.output
    base = AutoModelForSequenceClassification.from_pretrained(bert)
    ids = torch.arange(3, 13).reshape(2, 5)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "a", is_trainable=True)
    named = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert sum("lora_A" in name for name in named) == 4
    assert any("classifier" in name for name in named)
    assert loaded(ids).logits.shape == (2, 2)
    assert loaded.peft_config["default"].r == 4


def test_a_causal_model(run: Run, llama: Path, tmp_path: Path) -> None:
    result = run(
        "inject",
        llama,
        "--targets",
        "all-linear",
        "--set",
        "r=2",
        "--set",
        "use_rslora=true",
        "-o",
        tmp_path / "a",
    )
    assert result.exit_code == 0, result.output
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "a")
    assert loaded.peft_config["default"].use_rslora
    assert sum("lora_A" in name for name, _ in loaded.named_parameters()) == 14


def test_dry_run(run: Run, llama: Path, tmp_path: Path) -> None:
    before = digest(llama)
    result = run(
        "inject", llama, "--targets", "q_proj,v_proj", "--layers-to-transform", "1", "--dry-run", "--json"
    )
    said = json.loads(result.stdout)
    assert said["sites"] == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]
    assert said["hits"] == {"q_proj": 1, "v_proj": 1}
    shown = run(
        "inject", llama, "--targets", "q_proj", "--rank-pattern", "layers.0.self_attn.q_proj=2", "--dry-run"
    ).stdout
    assert "LoRA(r=2" in shown and "model.layers.0.self_attn.q_proj" in shown
    assert digest(llama) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--targets", "q_proj,v_prj"], "'v_prj' matched none of"),
        (["--targets", "q_proj", "--exclude-modules", "k_prj"], "'k_prj' matched none of"),
        (["--targets", "q_proj", "--layers-to-transform", "0,7"], "Layer 7 holds none"),
        (["--targets", "q_proj", "--set", "rr=4"], "no hyper-parameter 'rr'"),
        (["--targets", "q_proj", "--r", "0"], "a rank is at least 1"),
        (["--targets", "input_layernorm"], "a norm's"),
        (["--targets", "q_proj", "--modules-to-save", "classfier"], "'classfier' is no module"),
        (["--targets", "q_proj", "--method", "lara"], "'lara' is no method"),
        (["--targets", "q_proj", "--rank-pattern", "k_proj=4"], "'k_proj' matched none of"),
        (["--targets", "q_proj", "--task", "seqcls"], "'seqcls' is no task"),
        ([], "No target was given"),
    ],
)
def test_refusals(run: Run, llama: Path, tmp_path: Path, words: list[str], said: str) -> None:
    result = run("inject", llama, *words, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_usage_is_two(run: Run) -> None:
    assert run("inject").exit_code == 2
    assert run("merge", "model").exit_code == 2
