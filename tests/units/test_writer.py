"""What is written is whole or absent, and safetensors reads it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pickle
import resource
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from peftsurgery.changes import Replacement
from peftsurgery.disk import output
from peftsurgery.disk.durable import copy_file, staged, write_json
from peftsurgery.disk.pieces import BLOCK, Piece
from peftsurgery.disk.shard import DTYPES, read_shard
from peftsurgery.disk.writer import ShardDone, ShardTask, write_shard
from peftsurgery.errors import CheckpointError, TruncatedShard

NEWER = (torch.float8_e8m0fnu,)
"""Dtypes that torch has and the installed reader has no word for."""


def written(file: Path, tensors: dict[str, Tensor], **metadata: str) -> ShardDone:
    pieces = tuple(Piece(name, tensor.dtype, tensor) for name, tensor in tensors.items())
    return write_shard(ShardTask(file, pieces, metadata))


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
    written(file, tensors, format="pt", by="us")
    found = load_file(file)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(bits(found[name]), bits(tensor)), name
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "by": "us"}
    assert [stored.name for stored in read_shard(file).tensors] == list(tensors)
    assert read_shard(file).tensors[0].start % 8 == 0
    written(file, {"large": torch.zeros(BLOCK // 4)})
    assert read_shard(file).tensors[0].start % 4096 == 0


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def test_a_file_without_tensors_or_metadata_is_a_file(tmp_path: Path) -> None:
    written(tmp_path / "x", {})
    assert load_file(tmp_path / "x") == {}


def base(path: Path) -> tuple[Piece, ...]:
    """What a file can be made of: bytes moved, rows folded and cast, tensors replaced and new, at odd offsets."""
    chance = torch.Generator().manual_seed(0)
    held = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "long": torch.randn(3000, 500, generator=chance),
        "half": torch.randn(1000, 700, generator=chance).half(),
        "word": torch.randn(70, generator=chance).bfloat16(),
        "tail": torch.randn(2000, 300, generator=chance),
    }
    save_file(held, path)
    stored = {found.name: found for found in read_shard(path).tensors}
    change = Replacement(torch.randn(2000, 300, generator=chance))
    return (
        Piece("first", torch.uint8, stored["odd"]),
        Piece("moved", torch.float32, stored["long"]),
        Piece("cast", torch.float32, stored["half"]),
        Piece("again", torch.float16, stored["half"]),
        Piece("word", torch.bfloat16, stored["word"]),
        Piece("folded", torch.bfloat16, stored["tail"], (change,)),
        Piece("new", torch.float64, torch.arange(5.0, dtype=torch.float64)),
    )


def refusing(refused: int) -> Callable[..., int]:
    """A file system that opens files for direct writes, and refuses these."""
    write = os.pwrite

    def pwrite(descriptor: int, data: memoryview, start: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(refused, os.strerror(refused))
        return write(descriptor, data, start)

    return pwrite


def test_however_it_is_written_the_file_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = base(tmp_path / "base")
    task = ShardTask(tmp_path / "one", pieces, {"a": "b"}, 0o640, measure=True)
    done = write_shard(task)
    found, made = load_file(task.file), Replacement(pieces[5].changes[0].value)  # type: ignore[attr-defined]
    before = load_file(tmp_path / "base")
    assert torch.equal(found["moved"], before["long"]) and torch.equal(found["first"], before["odd"])
    assert torch.equal(found["cast"], before["half"].float()) and torch.equal(found["again"], before["half"])
    assert torch.equal(found["folded"], made.value.bfloat16())
    assert (done.nbytes, list(done.tallies)) == (task.file.stat().st_size, ["folded"])
    assert stat.S_IMODE(task.file.stat().st_mode) == 0o640
    assert done.tallies["folded"].numel == 600_000

    sent: ShardTask = pickle.loads(pickle.dumps(task))
    again = [replace(sent, file=tmp_path / str(threads), threads=threads) for threads in (1, 3, 7)]
    for other in again:
        assert write_shard(other).tallies == done.tallies
    for number, error in enumerate((errno.EINVAL, errno.ENOTSUP)):
        monkeypatch.setattr(os, "pwrite", refusing(error))
        again.append(replace(task, file=tmp_path / f"refused{number}"))
        write_shard(again[-1])
        monkeypatch.undo()
    monkeypatch.setattr(output, "DIRECT", 0)
    again.append(replace(task, file=tmp_path / "plain"))
    write_shard(again[-1])
    assert all(other.file.read_bytes() == task.file.read_bytes() for other in again)


def test_pages_are_shared_where_the_file_system_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FICLONERANGE, played by copying what it would share, and refusing what it would refuse."""
    pieces, shared = base(tmp_path / "base"), [0]
    write_shard(ShardTask(tmp_path / "copied", pieces))

    def ioctl(descriptor: int, request: int, asked: bytes) -> None:
        source, begin, nbytes, start = struct.unpack("qQQQ", asked)
        assert request == output.FICLONERANGE and not (begin % 4096 or nbytes % 4096 or start % 4096)
        os.pwrite(descriptor, os.pread(source, nbytes, begin), start)
        shared[0] += nbytes

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    write_shard(ShardTask(tmp_path / "shared", pieces[1:]))
    found, copied = load_file(tmp_path / "shared"), load_file(tmp_path / "copied")
    assert all(torch.equal(found[name], copied[name]) for name in found) and len(found) == len(pieces) - 1
    assert shared[0] > 0.9 * pieces[1].nbytes


def test_writing_again_writes_the_same_file(tmp_path: Path) -> None:
    task = ShardTask(tmp_path / "x", base(tmp_path / "base"))
    write_shard(task)
    first = task.file.read_bytes()
    (tmp_path / ".x.partial").write_bytes(b"what an earlier run left")
    task.file.write_bytes(b"something else")
    write_shard(task)
    assert task.file.read_bytes() == first
    assert everything(tmp_path) == {"base", "x"}


def test_a_base_that_shrinks_meanwhile_is_an_error(tmp_path: Path) -> None:
    task = ShardTask(tmp_path / "out" / "x", base(tmp_path / "base"))
    os.truncate(tmp_path / "base", 1_000_000)
    with pytest.raises(TruncatedShard, match="changed while it was being read"):
        write_shard(task)
    assert not task.file.exists()


def test_files_have_the_mode_that_the_user_asks_for(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with staged(tmp_path / "out") as directory:
            written(directory / "x", {})
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
    room, write, alone = [1000], os.pwrite, Lock()

    def full(descriptor: int, data: Any, start: int) -> int:
        with alone:  # two threads write
            if room[0] == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            taken = write(descriptor, memoryview(data)[: room[0]], start)
            room[0] -= taken
            return taken

    monkeypatch.setattr(os, "pwrite", full)
    tensors = {"a": torch.ones(100), "b": torch.ones(1000)}
    message = r"x\.safetensors cannot be written: No space left on device\. Make room"
    with pytest.raises(CheckpointError, match=message), staged(tmp_path / "out") as directory:
        written(directory / "x.safetensors", tensors)
    assert everything(tmp_path) == set()


def test_what_the_kernel_refuses_leaves_nothing(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(100_000)}
    refused = pytest.raises(CheckpointError, match="File too large")
    with refused, files_of_at_most(100_000), staged(tmp_path / "out") as directory:
        written(directory / "x", tensors)
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
