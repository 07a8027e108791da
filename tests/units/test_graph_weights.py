"""Graphs in files: whole, checked, and refused where they are not what they say."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from peftsurgery.errors import (
    CheckpointError,
    ExportError,
    MissingShard,
    SurgeryError,
    TruncatedShard,
    UnsafePath,
)
from peftsurgery.graph import weights
from tests.units.graphs import graph, node, noise


def linear() -> ir.Model:
    model = graph([node("MatMul", "x big.weight", "y")], {"big.weight": noise(4, 600)})
    model.graph.outputs[0].shape = ir.Shape(["batch", 600])
    return model


def test_weights_in_the_graph(tmp_path: Path) -> None:
    assert weights.save(linear(), tmp_path, inline=True) == [tmp_path / "model.onnx"]
    assert os.listdir(tmp_path) == ["model.onnx"]
    assert weights.nbytes(weights.load(tmp_path / "model.onnx")) == 4 * 600 * 4


def test_what_one_file_does_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "INLINE", 9600)
    with pytest.raises(ExportError, match="--weights copy"):
        weights.save(linear(), tmp_path, inline=True)
    assert not os.listdir(tmp_path)


def test_weights_in_one_file_beside_the_graph(tmp_path: Path) -> None:
    files = weights.save(linear(), tmp_path, name="encoder_model.onnx")
    assert [file.name for file in files] == ["encoder_model.onnx", "encoder_model.onnx.data"]
    assert sorted(os.listdir(tmp_path)) == [file.name for file in files]
    assert files[0].stat().st_size < 1000 <= 9600 <= files[1].stat().st_size
    onnx.checker.check_model(str(files[0]), full_check=True)
    session = onnxruntime.InferenceSession(str(files[0]), providers=["CPUExecutionProvider"])
    feed = {"x": noise(2, 4), "ids": np.zeros(2, np.int64)}
    names = [port.name for port in session.get_inputs()]
    (found,) = session.run(None, {name: feed[name] for name in names})
    assert np.allclose(found, noise(2, 4) @ noise(4, 600), atol=1e-5)


def test_a_graph_that_is_no_valid_onnx_is_not_kept_quietly(tmp_path: Path) -> None:
    model = graph([node("MatMul", "x a.weight", "y"), node("NoSuchOp", "y", "z")], {"a.weight": noise(4, 2)})
    with pytest.raises(ExportError, match="invalid ONNX"):
        weights.save(model, tmp_path)


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Path, Path]:
    model, data = weights.save(linear(), tmp_path)
    return model, data


def test_missing_and_short_weights(parts: tuple[Path, Path]) -> None:
    model, data = parts
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(TruncatedShard, match=r"model\.onnx\.data.*big\.weight"):
        weights.load(model)
    data.unlink()
    with pytest.raises(MissingShard, match=r"model\.onnx\.data"):
        weights.load(model)


@pytest.mark.parametrize("place", ["../secret", "/etc/passwd", "below/../../secret"])
def test_weights_outside_the_directory_are_not_read(parts: tuple[Path, Path], place: str) -> None:
    proto = onnx.load(parts[0], load_external_data=False)
    entry = next(e for e in proto.graph.initializer[0].external_data if e.key == "location")
    entry.value = place
    parts[0].write_bytes(proto.SerializeToString())
    with pytest.raises(UnsafePath, match="outside the model's directory"):
        weights.load(parts[0])


def test_a_link_that_leaves_the_directory_is_not_followed(parts: tuple[Path, Path], tmp_path: Path) -> None:
    elsewhere = tmp_path.parent / f"{tmp_path.name}_elsewhere"
    parts[1].rename(elsewhere)
    parts[1].symlink_to(elsewhere)
    with pytest.raises(UnsafePath):
        weights.load(parts[0])


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 64, None])
def test_what_is_no_model(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.onnx.*Name an `\.onnx` file") as caught:
        weights.load(path)
    assert isinstance(caught.value, SurgeryError)
