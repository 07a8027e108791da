"""What is written is whole or absent, and safetensors reads it."""

from __future__ import annotations

import errno
import json
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from peftsurgery.disk.durable import copy_file, staged, write_json
from peftsurgery.disk.shard import DTYPES, read_shard
from peftsurgery.disk.writer import Entry, write_safetensors
from peftsurgery.errors import CheckpointError

NEWER = (torch.float8_e8m0fnu,)
"""Dtypes that torch has and the installed reader has no word for."""


def entries(tensors: dict[str, Tensor]) -> list[Entry]:
    return [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def everything(room: Path) -> set[str]:
    return {str(file.relative_to(room)) for file in room.rglob("*")}


def samples() -> dict[str, Tensor]:
    """One tensor of every dtype, and the awkward shapes."""
    raw = torch.arange(64, dtype=torch.uint8)
    found = {str(dtype): raw.view(dtype) for dtype in DTYPES.values() if dtype not in (torch.bool, *NEWER)}
    return {
        **found,
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5, dtype=torch.float16),
        "empty": torch.empty(0, 4),
        "turned": torch.arange(6.0).reshape(2, 3).t(),
        "grad": torch.nn.Parameter(torch.ones(2)),
        "é'\"\n": torch.ones(1),
    }


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    file, tensors = tmp_path / "x.safetensors", samples()
    write_safetensors(file, entries(tensors), iter(tensors.items()), {"format": "pt", "by": "us"})
    found = load_file(file)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(bits(found[name]), bits(tensor)), name
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "by": "us"}
    assert [stored.name for stored in read_shard(file).tensors] == list(tensors)
    assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def test_a_file_without_tensors_or_metadata_is_a_file(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", [], [], {})
    assert load_file(tmp_path / "x") == {}


def test_one_stream_fills_several_files(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2), "b": torch.zeros(3)}
    coming = iter(tensors.items())
    for entry in entries(tensors):
        write_safetensors(tmp_path / "deep" / entry.name, [entry], coming, {})
    assert load_file(tmp_path / "deep" / "b").keys() == {"b"}


@pytest.mark.parametrize(
    "coming",
    [{}, {"b": torch.ones(2)}, {"a": torch.ones(3)}, {"a": torch.ones(2).half()}],
    ids=["nothing", "name", "shape", "dtype"],
)
def test_a_stream_that_is_not_what_was_announced_is_an_error(
    coming: dict[str, Tensor], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="'a' was announced as"):
        write_safetensors(tmp_path / "x", [Entry("a", torch.float32, (2,))], coming.items(), {})


def test_files_have_the_mode_that_the_user_asks_for(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with staged(tmp_path / "out") as directory:
            write_safetensors(directory / "x", [], [], {})
            write_json(directory / "y", {})
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / "out" / name).stat().st_mode) for name in (".", "x", "y")]
    assert modes == [0o750, 0o640, 0o640]


@pytest.mark.parametrize("place", ["out", "not/yet/there", "./out/../out2"])
def test_a_directory_appears_whole(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    with staged(Path(place)) as directory:
        (directory / "deep").mkdir()
        write_json(directory / "deep" / "x.json", {"ü": [1]})
        assert not any(Path(place).iterdir()) if Path(place).is_dir() else not Path(place).exists()
    assert json.loads((tmp_path / place / "deep" / "x.json").read_text(encoding="utf-8")) == {"ü": [1]}
    assert not [name for name in everything(tmp_path) if "partial" in name]


def test_a_link_to_an_empty_directory_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with staged(tmp_path / "link") as directory:
        write_json(directory / "x.json", 1)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "x.json").read_text() == "1\n"


def test_an_output_that_holds_something_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for place, message in (
        ("out", "is not empty .*'precious'"),
        ("file", "is a file"),
        ("file/in", "cannot be written"),
    ):
        with pytest.raises(CheckpointError, match=message), staged(tmp_path / place):
            pytest.fail("the block ran")
    assert everything(tmp_path) == {"out", "out/precious", "file"}


def test_the_current_directory_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"current directory.*`model`"), staged(Path(".")):
        pytest.fail("the block ran")


@pytest.mark.parametrize("failure", [KeyboardInterrupt, SystemExit, ValueError, GeneratorExit])
@pytest.mark.parametrize("place", ["out", "not/yet/there", "empty"])
def test_whatever_fails_leaves_nothing(failure: type[BaseException], place: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(failure), staged(tmp_path / place) as directory:
        (directory / "deep").mkdir()
        write_json(directory / "deep" / "x.json", {})
        raise failure
    assert everything(tmp_path) == {"empty"}


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room, write = [1000], os.pwrite

    def full(descriptor: int, data: Any, start: int) -> int:
        if room[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = write(descriptor, memoryview(data)[: room[0]], start)
        room[0] -= taken
        return taken

    monkeypatch.setattr(os, "pwrite", full)
    tensors = {"a": torch.ones(100), "b": torch.ones(1000)}
    message = r"x\.safetensors cannot be written: No space left on device\. Make room"
    with pytest.raises(CheckpointError, match=message), staged(tmp_path / "out") as directory:
        write_safetensors(directory / "x.safetensors", entries(tensors), tensors.items(), {})
    assert everything(tmp_path) == set()


def test_what_the_kernel_refuses_leaves_nothing(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(100_000)}
    refused = pytest.raises(CheckpointError, match="File too large")
    with refused, files_of_at_most(100_000), staged(tmp_path / "out") as directory:
        write_safetensors(directory / "x", entries(tensors), tensors.items(), {})
    assert everything(tmp_path) == set()


@contextmanager
def files_of_at_most(nbytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_at_the_last_flush_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(CheckpointError, match="No space left"), staged(tmp_path / "out") as directory:
        write_json(directory / "x.json", {})
        monkeypatch.setattr(os, "fsync", full)
    assert everything(tmp_path) == set()


def test_an_output_that_fills_up_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written"), staged(tmp_path / "out") as directory:
        write_json(directory / "x.json", {})
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("")
    assert everything(tmp_path) == {"out", "out/theirs"}


def test_errors_of_the_caller_keep_their_own_words(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="elsewhere"), staged(tmp_path / "out"):
        raise FileNotFoundError("elsewhere")


def test_a_copy_holds_what_a_link_leads_to(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("text")
    (tmp_path / "link").symlink_to("blob")
    copy_file(tmp_path / "link", tmp_path / "copy")
    assert (tmp_path / "copy").read_text() == "text"
    assert not (tmp_path / "copy").is_symlink()
    with pytest.raises(CheckpointError, match="cannot be written"):
        copy_file(tmp_path / "blob", tmp_path / "no" / "copy")
