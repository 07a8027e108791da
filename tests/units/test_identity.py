"""What tells files apart."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from peftsurgery.disk.identity import Identity, identify
from peftsurgery.errors import CheckpointError


def written(file: Path, value: float, name: str = "a.weight") -> Path:
    save_file({name: torch.full((3, 4), value)}, file, metadata={"format": "pt"})
    return file


def test_the_header_tells_names_and_the_whole_tells_values(tmp_path: Path) -> None:
    one, two = written(tmp_path / "1", 1.0), written(tmp_path / "2", 2.0)
    other = written(tmp_path / "3", 1.0, "b.weight")
    assert identify(one) == identify(two) != identify(other)
    assert identify(one, full=True) != identify(two, full=True)
    assert identify(one, full=True).sha256 == hashlib.sha256(one.read_bytes()).hexdigest()


def test_two_match_as_far_as_both_know(tmp_path: Path) -> None:
    one, two = written(tmp_path / "1", 1.0), written(tmp_path / "2", 2.0)
    assert identify(one, full=True).matches(identify(one))
    assert identify(one).matches(identify(two)), "headers say nothing of values"
    assert not identify(one, full=True).matches(identify(two, full=True))


def test_json_round_trip(tmp_path: Path) -> None:
    file = written(tmp_path / "1", 1.0)
    for full in (False, True):
        found = identify(file, full=full)
        assert Identity.from_dict(found.to_dict()) == found
    assert "sha256" not in identify(file).to_dict()


@pytest.mark.parametrize("content", [b"", b"abc", (1 << 62).to_bytes(8, "little") + b"{}"])
def test_a_file_of_any_content_has_an_identity(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "strange").write_bytes(content)
    assert identify(tmp_path / "strange").size == len(content)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="gone"):
        identify(tmp_path / "gone")
