"""A list of adapters: what it says, and what is wrong with it, all at once and before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftsurgery.commands.adapter_list import listed
from peftsurgery.errors import PlanError


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """A directory with adapters `a`, `b`, `r=8` and `#c`, and a directory that is none."""
    for name in ("a", "b", "r=8", "#c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    (tmp_path / "none").mkdir()
    return tmp_path


def written(room: Path, text: str) -> Path:
    (room / "list.txt").write_text(text, encoding="utf-8")
    return room / "list.txt"


@pytest.mark.parametrize(
    ("line", "name", "path"),
    [
        ("a", "a", "a"),
        ("  ./a/  ", "a", "a"),
        ("none/../a", "a", "a"),
        ("mine=a", "mine", "a"),
        ("mine = a  # the first", "mine", "a"),
        ("mine=./r=8", "mine", "r=8"),
        ("./r=8", "r=8", "r=8"),
        ("./#c", "#c", "#c"),
        ("x=./#c # why not", "x", "#c"),
        ("v1.2-final=a\r", "v1.2-final", "a"),
    ],
)
def test_a_line(room: Path, line: str, name: str, path: str) -> None:
    (entry,) = listed(written(room, f"# a list\n\n{line}\n"))
    assert (entry.name, entry.path.resolve()) == (name, (room / path).resolve())


def test_a_mark_of_byte_order_is_no_name(room: Path) -> None:
    assert [entry.name for entry in listed(written(room, "\ufeffa\nb"))] == ["a", "b"]


def test_an_absolute_path(room: Path) -> None:
    (entry,) = listed(written(room, f"x={room / 'a'}"))
    assert entry.path == room / "a"


def test_a_directory_of_adapters(room: Path) -> None:
    assert [entry.name for entry in listed(room)] == ["#c", "a", "b", "r=8"]


def test_names_in_python(room: Path) -> None:
    assert [(entry.name, entry.path) for entry in listed({"x": room / "b"})] == [("x", room / "b")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a\nb\na", ["(line 1, line 3) is there several times", "'a' (line 1, line 3) names several"]),
        ("x=a\ny=b/../a", ["is there several times"]),
        ("x=a\nX=b", ["'x' (line 1, line 2) names several"]),
        ("gone\nlost", ["gone (line 1) is not there", "lost (line 2) is not there"]),
        ("none", ["none (line 1) holds no adapter"]),
        (".x=a\n=b", ["'.x' (line 1) cannot be the name", "'' (line 2) cannot be the name"]),
        ("..=a", ["'..' (line 1) cannot be the name"]),
        ("a\\b=a", ["cannot be the name"]),
        ("# nothing\n", ["names no adapter"]),
        ("\n".join(f"no{i}" for i in range(20)), ["no7 (line 8)", "and 12 more"]),
    ],
)
def test_everything_that_is_wrong_is_told(room: Path, text: str, said: list[str]) -> None:
    with pytest.raises(PlanError) as caught:
        listed(written(room, text))
    assert [words for words in said if words not in str(caught.value)] == []
    assert "nothing was written" in str(caught.value)


def test_what_is_no_list(room: Path) -> None:
    (room / "binary").write_bytes(b"\xff\xfe\x00")
    for source in (room / "binary", room / "absent.txt", room / "none"):
        with pytest.raises(PlanError, match="nothing was written"):
            listed(source)
