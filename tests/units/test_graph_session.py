"""Running a graph, and saying on what."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from peftsurgery.errors import ExportError
from peftsurgery.graph import captured, weights
from peftsurgery.graph import session as module
from peftsurgery.graph.session import CPU, CUDA, Session
from peftsurgery.graph.signature import Port
from tests.units.graphs import graph, node, noise

REAL = onnxruntime.InferenceSession


@pytest.fixture
def path(tmp_path: Path) -> Path:
    model = graph([node("Gather", "table ids", "r"), node("Add", "x r", "y")], {"table": noise(7, 4)})
    model.graph.outputs[0].shape = ir.Shape(["batch", 4])
    return weights.save(model, tmp_path)[0]


def test_outputs_by_name_and_feeds_too_many(path: Path) -> None:
    session = Session(path, ["cpu"], threads=1)
    feeds = {"x": noise(2, 4), "ids": np.array([6, 0]), "attention_mask": np.ones((2, 4))}
    assert (session.provider, session.remark) == (CPU, "")
    assert np.array_equal(session(feeds)["y"], noise(2, 4) + noise(7, 4)[[6, 0]])
    with pytest.raises(ExportError, match="'ids'"):
        session.run({"x": noise(2, 4)})


def test_providers_that_are_not_here(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match="has no NoSuchProvider"):
        Session(path, ["NoSuchProvider"])
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    with pytest.raises(ExportError, match=r"built for the CPU alone.*onnxruntime-gpu"):
        Session(path, ["cuda"])
    assert Session(path).provider == CPU


def test_cuda_that_does_not_start_is_said_and_not_printed(
    path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A build for CUDA on a machine without it, played: it prints what it misses and falls back."""

    def preload() -> None:
        print("Failed to load libcublasLt.so.13: cannot open shared object file")

    real = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "preload_dlls", preload)
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *a, providers: real(*a, providers=[CPU]))
    session = Session(path)
    assert session.provider == CPU
    assert "libcublasLt.so.13" in session.remark
    with pytest.raises(ExportError, match=r"CUDA.*did not start: Failed to load libcublasLt"):
        Session(path, ["cuda", "cpu"])
    assert capfd.readouterr() == ("", "")


class Replaying:
    """ONNX Runtime with CUDA, played by the CPU's: it notes its providers, and what every run was bound to."""

    def __init__(self, *words: Any, providers: Sequence[Any]) -> None:
        self.real = REAL(*words, providers=[CPU])
        self.asked, self.runs = providers, list[tuple[Any, str]]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def get_providers(self) -> list[str]:
        return [CUDA, CPU]

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        self.runs.append((binding, options.get_run_config_entry("gpu_graph_id")))
        self.real.run_with_iobinding(binding, options)


@pytest.fixture
def replaying(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Replaying)
    monkeypatch.setattr(captured, "DEVICE", "cpu")


@pytest.mark.usefixtures("replaying")
def test_a_cuda_graph_is_recorded_once_for_a_shape_and_fed_in_place(path: Path) -> None:
    session = Session(path, cuda_graph=True)
    played: Any = session._session
    assert played.asked == [(CUDA, {"enable_cuda_graph": "1"}), CPU]
    for ids in ([6, 0], [1, 1], [3], [2, 5]):
        found = session({"x": noise(len(ids), 4), "ids": np.array(ids)})["y"]
        assert np.array_equal(found, noise(len(ids), 4) + noise(7, 4)[ids])
    bindings, numbers = zip(*played.runs, strict=True)
    assert numbers == ("1", "1", "2", "1"), "a number of its own for each shape"
    assert bindings[0] is bindings[1] is bindings[3] is not bindings[2]
    with pytest.raises(ExportError, match="runs whole batches"):
        session.step({}, {})


@pytest.mark.usefixtures("replaying")
def test_what_grows_or_has_no_size_is_no_cuda_graph(tmp_path: Path) -> None:
    model = graph([node("NonZero", "ids", "at"), node("Gather", "x at", "y")], {})
    model.graph.outputs[0].shape = ir.Shape([1, "found", 4])
    session = Session(weights.save(model, tmp_path)[0], cuda_graph=True)
    with pytest.raises(ExportError, match=r"size of 'y' is 'found', which no input tells"):
        session({"x": noise(2, 4), "ids": np.array([1, 1])})
    keys = model.graph.inputs[0]
    keys.name, keys.shape = "past_key_values.0.key", ir.Shape(["batch", 2, "past", 4])
    with pytest.raises(ExportError, match=r"grow with every token.*Leave it out"):
        Session(weights.save(model, tmp_path)[0], cuda_graph=True)


def test_a_cuda_graph_needs_cuda(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match=r"does not run on CPU.*Name `cuda`"):
        Session(path, ["cpu"], cuda_graph=True)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *a, providers: REAL(*a, providers=[CPU]))
    with pytest.raises(ExportError, match="did not start"):
        Session(path, cuda_graph=True)


def test_a_file_that_the_runtime_refuses(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(ExportError, match=r"refuses .*model\.onnx"):
        Session(tmp_path / "model.onnx")


def test_a_foreign_graph_says_its_ports_and_its_config_the_rest(path: Path) -> None:
    with pytest.raises(ExportError, match=r"vocab_size.*config\.json"):
        Session(path).signature()
    config = {"vocab_size": 7, "pad_token_id": 1, "max_position_embeddings": 514, "type_vocab_size": 2}
    said = Session(path).signature(config)
    assert said.inputs[0] == Port("x", "float32", ("batch_size", 4))
    assert said.outputs == (Port("y", "float32", ("batch_size", 4)),)
    assert (said.vocab_size, said.pad_id, said.longest, said.type_vocab_size) == (7, 1, 512, 2)


def test_the_word_of_a_provider_is_the_runtimes() -> None:
    assert module.WORDS == {"cpu": CPU, "cuda": CUDA}
    assert CPU in onnxruntime.get_all_providers() and CUDA in onnxruntime.get_all_providers()


def test_bfloat16_goes_in_and_comes_out_as_what_float32_holds_of_it(tmp_path: Path) -> None:
    """A graph whose operations a CPU has in bfloat16 runs as it is, by OrtValues, for numpy has no such dtype."""
    nodes = [
        node("Cast", "x", "wide", to=1),
        node("Mul", "wide wide", "square"),
        node("Cast", "square", "y", to=16),
    ]
    model = graph(nodes, {})
    for value in (model.graph.inputs[0], model.graph.outputs[0]):
        value.dtype, value.shape = ir.DataType.BFLOAT16, ir.Shape(["batch", 4])
    session = Session(weights.save(model, tmp_path)[0], ["cpu"])
    x = np.float32([[1.5, 1 + 2**-12, -3, 0]])
    found = session({"x": x, "ids": np.array([0])})["y"]
    assert not session.widened and found.dtype == np.float32
    assert found.tolist() == [[2.25, 1, 9, 0]], "rounded to 8 bits on the way in and on the way out"
