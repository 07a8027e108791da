"""bench: who runs, who is left out and why, and what is refused before anything is timed."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import util
from pathlib import Path

import pytest
import torch
from click.testing import Result

import peftsurgery as ps
from peftsurgery.commands.bench import Row
from peftsurgery.commands.plotting import bars
from peftsurgery.errors import ExportError, PlanError
from tests.subjects import transformer

Run = Callable[..., Result]
T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 1, "num_heads": 4, "vocab_size": 101}
NO_COMPILER = "no C++ compiler"


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile as it is without a compiler: what it gives fails when it is run."""

    def compiled(model: torch.nn.Module, **_: object) -> object:
        def run(*_: object, **__: object) -> None:
            raise RuntimeError(NO_COMPILER)

        run.forward = model.forward  # type: ignore[attr-defined]
        return run

    monkeypatch.setattr(torch, "compile", compiled)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    model = transformer(
        "LlamaForCausalLM", {**sizes, "vocab_size": 101, "max_position_embeddings": 40, "eos_token_id": 2}
    )
    path = tmp_path_factory.mktemp("llama")
    model.save_pretrained(path)
    ps.export_onnx(path, out=path / "onnx", verify=False)
    return path


@pytest.mark.usefixtures("no_compiler")
def test_a_decoder_beside_its_model(run: Run, llama: Path, tmp_path: Path) -> None:
    words = ("--against", llama, "--batch", "2,1", "--length", "8,64", "--new-tokens", 3, "--runs", 2)
    found = json.loads(run("bench", llama / "onnx", *words, "--threads", 1, "--json").stdout)
    cells = [(row["batch"], row["length"], row["lap"], row["contestant"]) for row in found["rows"]]
    assert cells == [
        (rows, 8, lap, name)
        for rows in (1, 2)
        for lap in ("reading", "writing")
        for name in ("ours", "torch", "torch.onnx.export")
    ]
    for row in found["rows"]:
        tokens = row["batch"] * (row["length"] if row["lap"] == "reading" else 3)
        assert row["per_second"] == pytest.approx(tokens / row["median"] * 1e3)
        assert 0 < row["p25"] <= row["median"]
    assert all(row["over_ours"] == 1 for row in found["rows"] if row["contestant"] == "ours")
    length, compiler = found["left_out"]
    assert "64" in length and NO_COMPILER in compiler


@pytest.mark.usefixtures("no_compiler")
def test_an_encoder_decoder(tmp_path: Path) -> None:
    model = transformer("T5ForConditionalGeneration", {**T5, "decoder_start_token_id": 0, "pad_token_id": 0})
    ps.export_onnx(model, out=tmp_path / "onnx", verify=False)
    report = ps.bench(tmp_path / "onnx", against=model, batch=[2], length=[8], runs=2, new_tokens=2)
    assert {(row["lap"], row["contestant"]) for row in report.facts["rows"]} == {
        (lap, name) for lap in ("reading", "writing") for name in ("ours", "torch")
    }
    assert [why.split(":")[0] for why in report.facts["left_out"]] == ["torch.onnx.export", "torch.compile"]


@pytest.mark.usefixtures("no_compiler")
def test_images(run: Run, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    model = transformer("CLIPVisionModelWithProjection", {**sizes, "image_size": 8, "patch_size": 4})
    model.save_pretrained(tmp_path / "model")
    ps.export_onnx(tmp_path / "model", out=tmp_path / "onnx", verify=False)
    words = ("bench", tmp_path / "onnx", "--against", tmp_path / "model", "--batch", "1,3", "--runs", 2)
    found = json.loads(run(*words, "--json").stdout)
    assert [(row["batch"], row["length"], row["lap"], row["contestant"]) for row in found["rows"]] == [
        (rows, None, "reading", name) for rows in (1, 3) for name in ("ours", "torch", "torch.onnx.export")
    ]
    for row in found["rows"]:
        assert row["per_second"] == pytest.approx(row["batch"] / row["median"] * 1e3)


def test_bars_are_as_long_as_the_medians() -> None:
    def row(who: str, lap: str, median: float) -> Row:
        return Row(8, None, lap, who, median, median, 0.0, 1.0, 1.0)

    rows = [row("a", "reading", 4.0), row("b", "reading", 1.0), row("a", "writing", 0.1)]
    assert [len(bar) for bar in bars(rows)] == [16, 4, 16]


def test_an_export_alone(run: Run, bert: Path, tmp_path: Path) -> None:
    assert run("export-onnx", bert, "--no-verify", "-o", tmp_path / "onnx").exit_code == 0
    shown = run("bench", tmp_path / "onnx", "--batch", 1, "--length", "8", "--runs", 2).stdout
    assert "nothing to compare" in shown and "1 × 8" in shown and "█" * 16 in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"batch": "1,x"}, "--batch 1,8"),
        ({"length": "0"}, "--length 1,8"),
        ({"length": ()}, "--length 1,8"),
        ({"runs": 1}, "runs is 1"),
        ({"length": [64]}, "shorter `--length`"),
        ({"plot": "chart.txt"}, ".png"),
        ({"adapters": "nowhere"}, "nowhere"),
        ({"cuda_graph": True, "providers": ["cpu"]}, "CUDA graph does not run on CPU"),
    ],
)
def test_what_makes_no_sense_is_refused(llama: Path, words: dict[str, object], said: str) -> None:
    with pytest.raises(Exception, match=said) as caught:
        ps.bench(llama / "onnx", **words)
    assert isinstance(caught.value, ps.SurgeryError)


def test_no_graph(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"model\.onnx"):
        ps.bench(tmp_path)


def test_a_chart_without_matplotlib(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftsurgery.commands.plotting.find_spec", lambda _: None)
    with pytest.raises(PlanError, match="matplotlib"):
        ps.bench(llama / "onnx", plot="chart.png")


@pytest.mark.skipif(util.find_spec("matplotlib") is None, reason="matplotlib draws it")
def test_a_chart(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "charts" / "one.png"
    ps.bench(llama / "onnx", batch=[1], length=[8], runs=2, new_tokens=2, plot=file)
    assert file.read_bytes().startswith(b"\x89PNG")
