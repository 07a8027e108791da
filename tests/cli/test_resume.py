"""`merge MODEL ADAPTER -o OUT`, stopped anywhere: OUT is whole or absent, and `--resume` finishes it, bit for bit."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from transformers import AutoConfig, AutoModelForCausalLM

import peftsurgery as ps
from peftsurgery.commands.blueprints import CACHE
from peftsurgery.disk import engines
from peftsurgery.disk.lock import locked
from peftsurgery.disk.resumable import beside
from peftsurgery.errors import CheckpointError, DiskError, NonFiniteWeight
from peftsurgery.events import Event
from tests.cli.conftest import adapter_for, digest
from tests.strike import CHANGES, READS, points, struck

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def adapter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = AutoModelForCausalLM.from_pretrained(llama)
    return adapter_for(model, "q_proj,v_proj", tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.fixture
def tmp_path(memory: Path) -> Path:
    return memory


@pytest.fixture
def job(llama: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """The merge, into `room/out`; what transformers says of the base is remembered."""
    monkeypatch.setenv(CACHE, str(tmp_path / "kept"))
    (tmp_path / "room").mkdir()

    def call(**words: object) -> object:
        return ps.merge(llama, adapter, **{"out": tmp_path / "room" / "out", **words})  # type: ignore[arg-type]

    return call


@pytest.fixture
def room(tmp_path: Path) -> Path:
    return tmp_path / "room"


@pytest.fixture
def whole(job: Callable[..., object], tmp_path: Path) -> dict[str, str]:
    """What every merge must come to."""
    job(out=tmp_path / "whole")
    return digest(tmp_path / "whole")


def check_blind(room: Path, whole: dict[str, str]) -> None:
    """OUT is whole or absent, and a directory with a `config.json` is whole too."""
    for place in (room / "out", beside(room / "out")):
        if (place / "config.json").exists() or place == room / "out":
            assert not place.exists() or digest(place) == whole
        else:
            with pytest.raises((OSError, ValueError)):
                AutoConfig.from_pretrained(place)


@pytest.mark.parametrize(
    ("how", "calls", "least"), [("kill", CHANGES, 60), ("torn", ("pwrite",), 15)], ids=["kill", "torn"]
)
def test_a_merge_that_is_killed_is_resumed(
    job: Callable[..., object],
    room: Path,
    whole: dict[str, str],
    how: str,
    calls: tuple[str, ...],
    least: int,
    llama: Path,
    adapter: Path,
) -> None:
    inputs, tried = digest(llama) | digest(adapter), 0
    for _ in points(job, how, calls):
        tried += 1
        resume_checked(job, room, whole)
    assert tried > least
    assert digest(llama) | digest(adapter) == inputs


def resume_checked(job: Callable[..., object], room: Path, whole: dict[str, str]) -> None:
    """After a strike: nothing can be mistaken, and `--resume` comes to the same bytes; `room` is empty again."""
    check_blind(room, whole)
    if not finished(room, whole):
        job(resume=True)
    assert digest(room / "out") == whole
    clear(room)


def finished(room: Path, whole: dict[str, str]) -> bool:
    """Whether it was struck at the last flush, when all was done."""
    return os.listdir(room) == ["out"] and digest(room / "out") == whole


def clear(room: Path) -> None:
    """Nothing is left beside OUT; it goes too."""
    assert [file.name for file in room.iterdir()] == ["out"]
    for file in (room / "out").iterdir():
        file.unlink()
    (room / "out").rmdir()


def struck_here(job: Callable[..., object], at: int, event: type[BaseException], **words: Any) -> str:
    """The message of a merge that is stopped as it tells its `at`-th tensor."""

    def stop(told: Event) -> None:
        if (told.verb, told.done) == ("write", at):
            raise event("stopped")

    with pytest.raises(event) as caught:
        job(listen=stop, **words)
    return str(caught.value)


@pytest.mark.parametrize(
    ("how", "calls"),
    [(str(errno.ENOSPC), CHANGES), (str(errno.EIO), (*CHANGES, *READS)), ("interrupt", CHANGES)],
    ids=["disk full", "failing", "interrupted"],
)
def test_an_error_keeps_whole_files_alone(
    job: Callable[..., object], room: Path, whole: dict[str, str], how: str, calls: tuple[str, ...]
) -> None:
    for _ in points(job, how, calls, step=3):
        check_blind(room, whole)
        left = beside(room / "out")
        if left.exists():  # something is kept: whole files, and nothing else
            assert {name: d for name, d in digest(left).items() if whole.get(name) != d} == {}
            assert any(name.endswith(".safetensors") for name in digest(left))
        resume_checked(job, room, whole)


def test_what_is_kept_is_told_and_taken_up(
    job: Callable[..., object], room: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    message = struck_here(job, 18, KeyboardInterrupt)
    assert "1 whole file is kept in" in message and "`--resume`" in message
    (kept,) = beside(room / "out").iterdir()
    before, written = kept.stat().st_mtime_ns, []
    write = engines.write_shard
    monkeypatch.setattr(
        engines, "write_shard", lambda task, listen: written.append(task.file.name) or write(task, listen)
    )
    told: list[Event] = []
    job(resume=True, listen=told.append)
    assert [event.done for event in told if event.verb == "write"] == list(range(1, 21))
    assert kept.name not in written and len(written) == 1
    assert (room / "out" / kept.name).stat().st_mtime_ns == before
    assert digest(room / "out") == whole
    clear(room)
    message = struck_here(job, 1, KeyboardInterrupt)
    assert message == "stopped" and list(room.iterdir()) == []  # no file was whole


@pytest.mark.parametrize("harm", ["flipped", "cut", "gone", "header"])
def test_what_is_not_whole_is_made_again(
    job: Callable[..., object], room: Path, whole: dict[str, str], harm: str
) -> None:
    struck_here(job, 18, KeyboardInterrupt)
    (kept,) = beside(room / "out").iterdir()
    data = bytearray(kept.read_bytes())
    data[-3] ^= 1 if harm == "flipped" else 0
    data[data.index(b"layers")] ^= 1 if harm == "header" else 0
    kept.write_bytes(data[:-8] if harm == "cut" else data)
    if harm == "gone":
        kept.unlink()
    (beside(room / "out") / "stray.safetensors").write_bytes(b"")
    job(resume=True)
    assert digest(room / "out") == whole
    clear(room)


def test_another_job_is_told_apart(
    job: Callable[..., object], room: Path, llama: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    struck_here(job, 18, KeyboardInterrupt)
    left = digest(room)
    for word, words in (
        ("dtype", {"dtype": "float32"}),
        ("weights", {"weight": [0.5]}),
        ("max_shard_size", {"max_shard_size": "10kB"}),
    ):
        with pytest.raises(CheckpointError, match=rf"another merge: it differs in '{word}'.*leave out"):
            job(resume=True, **words)
        assert digest(room) == left
    other = Path(shutil.copytree(llama, tmp_path / "other"))
    adapter = adapter_for(AutoModelForCausalLM.from_pretrained(llama), "q_proj,v_proj", tmp_path / "same")
    with pytest.raises(CheckpointError, match="base's last change"):  # it may hold other numbers
        os.utime(next(other.glob("*.safetensors")))
        ps.merge(other, adapter, out=room / "out", resume=True)
    job()  # without the word it begins anew
    assert digest(room / "out") == whole
    clear(room)


def test_a_journal_that_cannot_be_read_is_told(job: Callable[..., object], room: Path) -> None:
    struck_here(job, 18, KeyboardInterrupt)
    journal = room / ".out.partial.json"
    said = json.loads(journal.read_text())
    for damage in ("{", "[]", json.dumps({**said, "format": "2"}), json.dumps({**said, "files": {"a": {}}})):
        journal.write_text(damage)
        with pytest.raises(CheckpointError, match="cannot be understood"):
            job(resume=True)
    job()
    assert os.listdir(room) == ["out"]


def test_what_is_not_ours_stays(job: Callable[..., object], room: Path) -> None:
    beside(room / "out").mkdir()
    (beside(room / "out") / "precious").touch()
    for words in ({}, {"resume": True}):
        with pytest.raises(CheckpointError, match="holds what no merge wrote"):
            job(**words)
    assert [file.name for file in room.rglob("*")] == [".out.partial", "precious"]


def test_two_processes_do_not_write_one_model(job: Callable[..., object], room: Path) -> None:
    beside(room / "out").mkdir()
    with locked(beside(room / "out"), "busy"):
        for words in ({}, {"resume": True}):
            with pytest.raises(CheckpointError, match="Another process is merging into"):
                job(**words)
    job()
    assert os.listdir(room) == ["out"]


def test_bad_input_leaves_nothing_even_where_something_was_kept(
    job: Callable[..., object], room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    struck_here(job, 18, KeyboardInterrupt)

    def overflows(*_: object) -> None:
        raise NonFiniteWeight("It is not finite.", tensor="x")

    monkeypatch.setattr(engines, "write_shard", overflows)
    with pytest.raises(NonFiniteWeight):
        job(resume=True)
    assert list(room.iterdir()) == []


def test_the_command_says_what_it_kept(
    run: Run, job: Callable[..., object], llama: Path, adapter: Path, room: Path, whole: dict[str, str]
) -> None:
    words = ("merge", llama, adapter, "-o", room / "out")
    assert struck(lambda: run(*words), 40, "kill") != 0
    assert run(*words, "--resume", "--json").exit_code == 0
    assert digest(room / "out") == whole
    again = run(*words, "--resume")
    assert (again.exit_code, "is not empty" in again.stderr) == (1, True)
    refused = run("merge", llama, adapter, "--in-place", "--undo", room / "undo", "--resume")
    assert (refused.exit_code, "`--resume` is for a checkpoint" in refused.stderr) == (1, True)


def test_a_full_disk_says_what_it_kept(
    job: Callable[..., object], room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.pwrite

    def full(descriptor: int, data: Any, start: int) -> int:
        if "00002-of" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data, start)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DiskError, match=r"No space left.*Make room.*1 whole file is kept in .*`--resume`"):
        job()
