"""What is remembered of a base is what transformers would say again, or is not used."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from transformers import AutoModelForCausalLM

from peftsurgery.commands import blueprints
from peftsurgery.commands.blueprints import CACHE, blueprint
from peftsurgery.disk.checkpoint import Checkpoint, open_checkpoint
from peftsurgery.live.blueprint import Blueprint, draw
from peftsurgery.tasks import task
from tests.cli.conftest import adapter_for, digest

Run = Callable[..., Result]


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE, str(tmp_path / "kept"))
    return tmp_path / "kept"


def asked(checkpoint: Checkpoint, word: str | None = None, *, trusted: bool = False) -> Blueprint:
    return blueprint(checkpoint, task=task(word) if word else None, labels=None, trust_remote_code=trusted)


def no_drawing(*args: object, **kwargs: object) -> Blueprint:
    raise AssertionError("it was drawn")


def test_a_blueprint_survives_json(bert: Path, llama: Path) -> None:
    for path, word in ((bert, None), (bert, "seq-cls"), (llama, None)):
        names = open_checkpoint(path).tensors
        drawn = draw(path, names, task=task(word) if word else None)
        assert Blueprint.from_json(json.loads(json.dumps(drawn.to_json()))) == drawn
        assert bool(drawn.classes) == (word is not None)


def test_it_is_drawn_once_for_each_question(bert: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(bert)
    first, other = asked(checkpoint), asked(checkpoint, "seq-cls")
    assert first != other and len(list(kept.iterdir())) == 2
    monkeypatch.setattr(blueprints, "draw", no_drawing)
    assert (asked(checkpoint), asked(checkpoint, "seq-cls")) == (first, other)
    with pytest.raises(AssertionError, match="drawn"):
        asked(checkpoint, trusted=True)
    monkeypatch.setattr(blueprints, "version", lambda name: "another")
    with pytest.raises(AssertionError, match="drawn"):
        asked(checkpoint)


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"sites": 1}'])
def test_what_is_damaged_is_drawn_again(damage: str, bert: Path, kept: Path) -> None:
    checkpoint = open_checkpoint(bert)
    first = asked(checkpoint)
    (file,) = kept.iterdir()
    whole = file.read_bytes()
    file.write_text(damage)
    assert asked(checkpoint) == first
    assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_done_without(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for place in (str(tmp_path / "file"), ""):
        monkeypatch.setenv(CACHE, place)
        assert asked(open_checkpoint(bert)).architecture == "BertModel"


def test_a_remembered_base_is_merged_alike_and_without_transformers(
    run: Run, llama: Path, kept: Path, tmp_path: Path
) -> None:
    adapter = adapter_for(AutoModelForCausalLM.from_pretrained(llama), "q_proj,up_proj", tmp_path / "adapter")
    assert run("merge", llama, adapter, "-o", tmp_path / "drawn").exit_code == 0
    words = ["merge", str(llama), str(adapter), "-o", str(tmp_path / "remembered"), "--quiet"]
    code = f"import sys; from peftsurgery.cli import main; main({words}, standalone_mode=False); "
    code += "sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert digest(tmp_path / "drawn") == digest(tmp_path / "remembered")
