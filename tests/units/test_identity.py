"""What tells files apart."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from peftsurgery.disk.identity import Identity, identify, known
from peftsurgery.errors import CheckpointError


def written(file: Path, value: float, name: str = "a.weight") -> Path:
    save_file({name: torch.full((3, 4), value)}, file, metadata={"format": "pt"})
    return file


def large(file: Path, value: float, at: int) -> Path:
    """A file of many more pages than are sampled, with one number that is another."""
    tensor = torch.zeros(1 << 18)
    tensor[at] = value
    save_file({"a.weight": tensor}, file, metadata={"format": "pt"})
    return file


def test_the_header_tells_names_a_sample_other_values_and_the_whole_every_bit(tmp_path: Path) -> None:
    one, other = written(tmp_path / "1", 1.0), written(tmp_path / "2", 1.0, "b.weight")
    assert identify(one).header_sha256 != identify(other).header_sha256
    trained = written(tmp_path / "3", 2.0)
    assert identify(one).header_sha256 == identify(trained).header_sha256
    assert identify(one) != identify(trained)
    before, after = large(tmp_path / "4", 1.0, 3000), large(tmp_path / "5", 2.0, 3000)
    assert identify(before) == identify(after), "it lies between the samples"
    assert identify(before, full=True) != identify(after, full=True)
    assert identify(one, full=True).sha256 == hashlib.sha256(one.read_bytes()).hexdigest()


def test_two_match_as_far_as_both_know(tmp_path: Path) -> None:
    one, two = large(tmp_path / "1", 1.0, 3000), large(tmp_path / "2", 2.0, 3000)
    assert identify(one, full=True).matches(identify(one))
    assert identify(one, full=True).matches(identify(two)), "a sample does not say it all"
    assert not identify(one, full=True).matches(identify(two, full=True))


def test_a_file_that_was_written_to_is_asked_again(tmp_path: Path) -> None:
    file = written(tmp_path / "1", 1.0)
    first = known(file)
    assert known(file) is first
    file.unlink()
    assert known(written(file, 2.0)) != first


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
