"""Who writes the files: words that name nobody, and errors that travel."""

from __future__ import annotations

import inspect
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import peftsurgery as ps
from peftsurgery import errors
from peftsurgery.disk.engines import Failed, engine, local
from peftsurgery.disk.on_ray import portable
from peftsurgery.disk.pieces import Piece
from peftsurgery.disk.shard import read_shard
from peftsurgery.disk.writer import ShardTask, write_shard
from peftsurgery.errors import PlanError, SurgeryError
from peftsurgery.events import ignore

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, SurgeryError)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_can_be_sent(kind: type[SurgeryError]) -> None:
    _, *words = inspect.signature(kind.__init__).parameters.values()
    known = {word.name: ("a", word.name) for word in words if word.kind is word.KEYWORD_ONLY}
    said = [word.name for word in words if word.kind is word.POSITIONAL_OR_KEYWORD] or ["message"]
    error = kind(*said, **known)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (kind, str(error), vars(error))


def test_one_failure_does_not_stop_the_others(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    piece = Piece("x", torch.float32, torch.ones(2))
    tasks = [ShardTask(tmp_path / name, (piece,)) for name in ("file/no.safetensors", "yes.safetensors")]
    broken, whole = local(tasks, ignore)
    assert isinstance(broken, Failed) and broken.file == tasks[0].file
    assert whole.file == tasks[1].file and whole.file.is_file()


def test_a_word_for_no_engine() -> None:
    with pytest.raises(PlanError, match="'local', 'ray'"), engine("spark"):
        pass


def test_ray_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PlanError, match=r"pip install 'ray>=2\.60,<3'"), engine("ray"):
        pass


def test_an_engine_is_for_files(tmp_path: Path) -> None:
    adapter = ps.Adapter(ps.Plan(()), {})
    for model, words in (
        (torch.nn.Linear(2, 2), {}),
        (tmp_path / "model.onnx", {"out": tmp_path / "out"}),
        (tmp_path, {"in_place": True, "undo": tmp_path / "undo"}),
    ):
        with pytest.raises(PlanError, match="`--engine ray` is for a checkpoint"):
            ps.merge(model, adapter, engine="ray", **words)


def test_a_task_can_be_done_from_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save_file({"x": torch.ones(3)}, "base.safetensors")
    (stored,) = read_shard(Path("base.safetensors")).tensors
    made = portable(ShardTask(Path("out.safetensors"), (Piece("x", torch.float32, stored),)))
    linked = replace(made, file=tmp_path / "there" / "twin.safetensors", twin=Path("base.safetensors"))
    linked = portable(linked)
    monkeypatch.chdir(tmp_path / "there")
    for task in (made, linked):
        write_shard(pickle.loads(pickle.dumps(task)))
        assert torch.equal(load_file(task.file)["x"], torch.ones(3))
    assert made.file == tmp_path / "here" / "out.safetensors"
