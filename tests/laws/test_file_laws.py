"""The laws of files: round trip, atomicity, and folding on disk with the bits of folding in memory."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import peftsurgery as ps
from peftsurgery.adapter import Adapter
from peftsurgery.disk import checkpoint as disk
from peftsurgery.errors import SurgeryError
from peftsurgery.method import Method
from tests.laws.conftest import trained
from tests.merging import merge as merge_checkpoint
from tests.subjects import Subject


def stored(subject: Subject, directory: Path) -> dict[str, torch.Tensor]:
    """The subject as a checkpoint; a tied tensor is stored once, as transformers does."""
    model = subject.model()
    kept = {name: p.detach() for name, p in model.named_parameters()}
    directory.mkdir()
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    return kept


def digest(directory: Path) -> dict[str, str]:
    return {
        str(f.relative_to(directory)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in directory.rglob("*")
        if f.is_file()
    }


def test_round_trip(subject: Subject, method: Method, tmp_path: Path) -> None:
    adapter = trained(subject, method)
    ps.save_adapter(adapter, tmp_path / "one")
    read = ps.load_adapter(tmp_path / "one")
    assert {n: t.tolist() for n, t in read.tensors()} == {n: t.tolist() for n, t in adapter.tensors()}
    assert [step.method for step in read.plan.steps if step.method != method] == []
    ps.save_adapter(read, tmp_path / "two")
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    assert torch.equal(
        subject.run(ps.inject(subject.model(), read)), subject.run(ps.inject(subject.model(), adapter))
    )


def test_disk_is_memory(subject: Subject, method: Method, tmp_path: Path) -> None:
    adapter = trained(subject, method)
    kept = stored(subject, tmp_path / "base")
    before = digest(tmp_path / "base")
    (tmp_path / "out").mkdir()
    merge_checkpoint(disk.open_checkpoint(tmp_path / "base"), [adapter], tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    live = subject.model()
    ps.merge(live, adapter)
    expected = dict(live.named_parameters())
    assert merged.keys() == kept.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in merged)
    assert sum(not torch.equal(merged[name], kept[name]) for name in merged) == len(adapter.plan.steps)
    assert digest(tmp_path / "base") == before


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
def test_a_failed_save_leaves_nothing(
    subject: Subject,
    method: Method,
    failure: type[BaseException],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapter = trained(subject, method)

    def failing(*args: object, **kwargs: object) -> None:
        raise failure(28, "No space left on device")

    monkeypatch.setattr("os.fsync", failing)
    with pytest.raises((SurgeryError, KeyboardInterrupt)):
        ps.save_adapter(adapter, tmp_path / "deep" / "out")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    ps.save_adapter(adapter, tmp_path / "deep" / "out")
    assert isinstance(ps.load_adapter(tmp_path / "deep" / "out"), Adapter)
