"""AdapterHub's directories on the command line: written, looked into, fused, exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

import peftsurgery as ps
from peftsurgery.graph.session import Session
from tests.reference.test_adapterhub_files import GOLDEN, ROOT

Run = Callable[..., Result]
BASE, THEIRS = ROOT / "bases" / "bert", ROOT / "theirs"


@pytest.mark.parametrize("config", ps.CONFIGS)
def test_a_fresh_bottleneck(run: Run, config: str, tmp_path: Path) -> None:
    words = (
        "--method",
        "bottleneck",
        "--config",
        config,
        "--set",
        "reduction_factor=4",
        "-o",
        tmp_path / "one",
    )
    said = run("inject", BASE, *words)
    assert said.exit_code == 0, said.output
    told = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert told["config"]["leave_out"] == [] and told["name"] == "default" and told["model_type"] == "bert"
    assert ps.load_adapter(tmp_path / "one").plan.steps[0].method == ps.Bottleneck(
        **{**vars(ps.CONFIGS[config].method), "reduction_factor": 4.0}
    )


def test_a_fresh_fusion(run: Run, tmp_path: Path) -> None:
    members = ",".join(str(THEIRS / "bert-fusion" / name) for name in "ab")
    said = run("inject", BASE, "--method", "fusion", "--adapters", members, "-o", tmp_path / "both")
    assert said.exit_code == 0, said.output
    looked = run("inspect", tmp_path / "both", "--json")
    assert json.loads(looked.stdout)["sites"] == [f"bert.encoder.layer.{n}.output" for n in (0, 1)]
    told = json.loads((tmp_path / "both" / "a" / "adapter_config.json").read_text())
    assert told["config"]["leave_out"] == []


@pytest.mark.parametrize("case", ["bert-double", "bert-fusion", "bert-lora", "bert-prefix", "bert-normed"])
def test_exported(run: Run, case: str, tmp_path: Path) -> None:
    """What AdapterHub computes, ONNX Runtime computes from the exported graph."""
    out = tmp_path / "onnx"
    words = ("--adapter", THEIRS / case, "-o", out, "--task", "feature-extraction", "--allow-pickle")
    said = run("export-onnx", BASE, *words)
    assert said.exit_code == 0, said.output
    given = {key: GOLDEN[f"inputs/bert/{key}"] for key in ("input_ids", "attention_mask")}
    session = Session(out / "model.onnx", ["cpu"])
    made = session({**given, "token_type_ids": np.zeros_like(given["input_ids"])})["last_hidden_state"]
    assert np.abs(made - GOLDEN[f"theirs/{case}"]).max() <= 1e-4


def test_merged(run: Run, tmp_path: Path) -> None:
    assert run("merge", BASE, THEIRS / "bert-lora", "-o", tmp_path / "merged").exit_code == 0
    refused = run("merge", BASE, THEIRS / "bert-double", "-o", tmp_path / "not")
    assert refused.exit_code == 1 and "export-onnx" in refused.output
