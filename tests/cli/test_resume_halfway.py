"""A merge of a base in one file, stopped anywhere: `--resume` goes on in the middle of it, bit for bit."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peftsurgery.disk import halfway, jobs, output, writer
from peftsurgery.disk.resumable import beside
from peftsurgery.disk.rooms import PAGE
from tests.cli.conftest import digest
from tests.cli.test_resume import (
    adapter,
    check_blind,
    clear,
    finished,
    job,
    resume_checked,
    room,
    struck_here,
    tmp_path,
    whole,
)
from tests.strike import CHANGES, READS, points

Job = Callable[..., object]
__all__ = ["adapter", "job", "room", "tmp_path", "whole"]
"""Fixtures, here with another base."""


@pytest.fixture(scope="module")
def llama(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base, in one file, whose header is almost two pages long."""
    path = tmp_path_factory.mktemp("one file")
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(path)
    file = path / "model.safetensors"
    data = file.read_bytes()
    stop = 8 + int.from_bytes(data[:8], "little")
    text = data[8:stop].ljust(2 * PAGE - 96 - 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[stop:])
    return path


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A note for every few tensors of a small file."""
    monkeypatch.setattr(halfway, "EVERY", 4000)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where every job that is run begins."""
    begun: list[int] = []
    for kind in (jobs.Move, jobs.Make):
        monkeypatch.setattr(kind, "run", noting(kind.run, begun))
    return begun


def noting(run: Callable[..., jobs.Ran], begun: list[int]) -> Callable[..., jobs.Ran]:
    def noted(own: jobs.Move | jobs.Make, *words: object, **more: object) -> jobs.Ran:
        begun.append(own.start)
        return run(own, *words, **more)

    return noted


@pytest.fixture
def order(job: Job, room: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where all jobs begin, in the order in which they are written, of a merge that nothing stopped."""
    found: list[int] = []
    given = writer.jobs
    with monkeypatch.context() as patch:
        patch.setattr(
            writer, "jobs", lambda *words: [found.append(one.start) or one for one in given(*words)]
        )
        job()
    shutil.rmtree(room / "out")
    return found


@pytest.mark.parametrize(
    ("how", "calls", "step"),
    [
        ("kill", CHANGES, 2),
        ("torn", ("pwrite",), 1),
        ("interrupt", CHANGES, 2),
        (str(errno.EIO), (*CHANGES, *READS), 3),
    ],
    ids=["kill", "torn", "interrupt", "failing"],
)
def test_a_merge_that_is_stopped_is_resumed(
    job: Job, room: Path, whole: dict[str, str], how: str, calls: tuple[str, ...], step: int
) -> None:
    tried = halves = 0
    for _ in points(job, how, calls, step=step):
        tried += 1
        halves += any(room.rglob(f".model*{halfway.NOTE}"))
        resume_checked(job, room, whole)
    assert tried > 10 and halves > 2


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors lie in pages as in the base's file, as those of a large file do."""
    monkeypatch.setattr(writer, "BLOCK", 0)


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that lets files share pages; here they are copied."""

    def share(out: output.Output, source: Path, begin: int, start: int, nbytes: int) -> bool:
        if not out.shares or nbytes <= 0 or begin % PAGE or start % PAGE or nbytes % PAGE:
            return False
        os.pwrite(out.plain, source.read_bytes()[begin:][:nbytes], start)
        return True

    monkeypatch.setattr(output, "share", share)
    monkeypatch.setattr(jobs, "share", share)


@pytest.mark.usefixtures("pages", "shares")
def test_pages_that_are_shared_have_no_sums(job: Job, room: Path, whole: dict[str, str]) -> None:
    for _ in points(job, "kill", CHANGES, step=3):
        resume_checked(job, room, whole)


def test_a_base_that_shares_no_longer_is_begun_anew(
    job: Job, room: Path, pages: None, whole: dict[str, str], shares: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without sharing a file is laid out otherwise."""
    expected = load_file(room.parent / "whole" / "model.safetensors")
    for _ in points(job, "kill", CHANGES, step=3):
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(writer, "sharing", lambda out, source: False)
            if not finished(room, digest(room / "out") if (room / "out").exists() else {}):
                job(resume=True)
        held = load_file(room / "out" / "model.safetensors")
        assert held.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in held.items())
        clear(room)


def test_what_is_noted_is_not_made_again(
    job: Job, room: Path, whole: dict[str, str], order: list[int], made: list[int]
) -> None:
    message = struck_here(job, 18, KeyboardInterrupt)
    assert "part of a file is kept in" in message and "`--resume`" in message
    check_blind(room, whole)
    (note,) = room.rglob(f".model*{halfway.NOTE}")
    known = len(json.loads(note.read_text())["sums"])
    assert 0 < known < len(order)
    made.clear()
    job(resume=True)
    assert sorted(made) == sorted(order[known:])
    resume_checked(job, room, whole)


@pytest.mark.parametrize("harm", ["flipped", "cut", "gone", "note", "no note"])
def test_what_is_not_as_noted_is_made_again(
    job: Job, room: Path, whole: dict[str, str], order: list[int], made: list[int], harm: str
) -> None:
    struck_here(job, 18, KeyboardInterrupt)
    (note,) = room.rglob(f".model*{halfway.NOTE}")
    part = note.with_suffix("")
    data = bytearray(part.read_bytes())
    if harm == "flipped":
        data[order[0] + 5] ^= 1
        part.write_bytes(data)
    elif harm == "cut":
        part.write_bytes(data[: min(order) + 1])
    elif harm == "note":
        note.write_text('{"sums": [1, "x"')
    else:
        (part if harm == "gone" else note).unlink()
    made.clear()
    job(resume=True)
    assert sorted(made) == sorted(order)
    assert os.listdir(room) == ["out"]
    resume_checked(job, room, whole)


def test_without_the_word_nothing_is_gone_on_with(
    job: Job, room: Path, whole: dict[str, str], order: list[int], made: list[int]
) -> None:
    struck_here(job, 18, KeyboardInterrupt)
    made.clear()
    job()
    assert sorted(made) == sorted(order) and not beside(room / "out").exists()
    resume_checked(job, room, whole)
