"""The documentation speaks of what is there: commands parse, Python compiles, links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from peftsurgery.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "fixtures" / "README.md", *ROOT.glob("docs/*.md")]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def fenced(*languages: str) -> list[tuple[str, str]]:
    """(page, code) for every fenced block of one of these languages."""
    blocks = [(name, *found) for name, text in TEXTS.items() for found in FENCE.findall(text)]
    return [(name, code) for name, language, code in blocks if language in languages]


def lines(command: str) -> list[str]:
    """The lines of console blocks and of the demo that call `command`."""
    demo = (ROOT / "examples" / "demo.sh").read_text(encoding="utf-8")
    shell = [code for _, code in fenced("console")] + [re.sub(r"^run ", "", demo, flags=re.MULTILINE)]
    return [line for code in shell for line in code.splitlines() if line.startswith(f"{command} ")]


@pytest.mark.parametrize("line", lines("peftsurgery"))
def test_a_command_parses(line: str) -> None:
    name, *words = shlex.split(line, comments=True)[1:]
    command = main.commands[name]
    assert command.make_context(name, words).params


def test_a_flag_that_does_not_exist_is_seen() -> None:
    with pytest.raises(click.UsageError):
        main.commands["merge"].make_context("merge", ["MODEL", "ADAPTER", "--nonsense"])


@pytest.mark.parametrize("line", lines("make"))
def test_a_make_target_is_there(line: str) -> None:
    target = shlex.split(line, comments=True)[1]
    assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE)


@pytest.mark.parametrize(("page", "code"), fenced("python"))
def test_python_compiles(page: str, code: str) -> None:
    assert compile(code, page, "exec")


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", TEXTS[page])
    assert [target for target in targets if not (ROOT / page).parent.joinpath(target).exists()] == []


def test_there_is_something_to_check() -> None:
    assert len(lines("peftsurgery")) > 8
    assert len(fenced("python")) > 2
    assert any("](docs/install.md)" in text for text in TEXTS.values())
