"""A patch in place that is stopped anywhere leaves a model that its undo file makes whole."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest
from torch import Tensor

from peftsurgery.disk.checkpoint import open_checkpoint
from peftsurgery.disk.in_place import patch, recover, unpatch
from peftsurgery.disk.marker import MARKER, marked
from peftsurgery.errors import CheckpointError, NonFiniteWeight
from tests.strike import UNREACHED, points, struck
from tests.units.test_disk_merge import MIX, QUERY, adapter, base, base_tensors, digests, overflowing, sharded

Layouts = Callable[[Path, Mapping[str, Tensor]], Path]


def patched(model: Path, undo: Path) -> None:
    recover(model, undo)
    patch(open_checkpoint(model), [adapter(QUERY, MIX)], undo, {"verb": "merge"}, "these adapters")


def unpatched(model: Path, undo: Path) -> None:
    unpatch(model, undo)


@pytest.fixture
def tmp_path(memory: Path) -> Path:
    return memory


@pytest.fixture(params=[base, sharded], ids=["single", "sharded"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    layout: Layouts = request.param
    path = layout(tmp_path / "model", base_tensors())
    (path / "config.json").write_text("{}")
    return path


def weights(model: Path) -> dict[str, str]:
    return {name.removeprefix(".").removesuffix(".patching"): d for name, d in digests(model).items()}


def check_blind(model: Path, before: dict[str, str], after: dict[str, str]) -> None:
    """What is neither the old nor the new model has no config.json, and is refused."""
    held = {name: d for name, d in weights(model).items() if "safetensors" in name}
    mixed = all(any(held[name] != whole[name] for name in held) for whole in (before, after))
    if mixed:
        assert not (model / "config.json").exists()
    if (model / MARKER).exists():
        with pytest.raises(CheckpointError, match=r"half patched.*unmerge"):
            open_checkpoint(model)
    else:
        assert not mixed


@pytest.fixture
def outcomes(model: Path, tmp_path: Path) -> tuple[dict[str, str], dict[str, str]]:
    before, undo = digests(model), tmp_path / "first.undo"
    patched(model, undo)
    after = digests(model)
    assert after != before
    unpatched(model, undo)
    assert digests(model) == before
    undo.unlink()
    return before, after


def forgetful(found: dict[str, str]) -> dict[str, str]:
    """Without what a process that was killed may leave beside the model."""
    return {name: d for name, d in found.items() if not name.endswith(".partial")}


@pytest.mark.parametrize("how", ["kill", "torn"])
def test_a_patch_that_is_killed_is_undone_and_done_again(
    model: Path, tmp_path: Path, outcomes: tuple[dict[str, str], dict[str, str]], how: str
) -> None:
    before, after = outcomes
    undo, tried = tmp_path / "model.undo", 0
    for _ in points(partial(patched, model, undo), how):
        tried += 1
        check_blind(model, before, after)
        if undo.exists():
            unpatched(model, undo)
        assert forgetful(digests(model)) == before
    assert tried > 20
    assert forgetful(digests(model)) == after
    unpatched(model, undo)
    assert struck(partial(patched, model, undo), tried // 2, how) != UNREACHED
    patched(model, undo)  # the same command again
    assert forgetful(digests(model)) == after


@pytest.mark.parametrize("how", ["kill", "torn"])
def test_an_undoing_that_is_killed_is_done_again(
    model: Path, tmp_path: Path, outcomes: tuple[dict[str, str], dict[str, str]], how: str
) -> None:
    before, after = outcomes
    undo = tmp_path / "model.undo"
    patched(model, undo)
    for _ in points(partial(unpatched, model, undo), how):
        check_blind(model, before, after)
        unpatched(model, undo)
        assert forgetful(digests(model)) == before
        patched(model, undo)
    assert forgetful(digests(model)) == before


@pytest.mark.parametrize("how", [str(errno.ENOSPC), str(errno.EIO), "interrupt"])
def test_an_error_is_undone_at_once(
    model: Path, tmp_path: Path, outcomes: tuple[dict[str, str], dict[str, str]], how: str
) -> None:
    before, after = outcomes
    undo = tmp_path / "model.undo"
    for _ in points(partial(patched, model, undo), how):
        assert marked(model) is None
        if digests(model) != after:  # struck at the last flush, when it was done
            assert digests(model) == before
            assert not undo.exists()
        else:
            unpatched(model, undo)
            undo.unlink()


def test_what_is_not_finite_is_taken_back(model: Path, tmp_path: Path) -> None:
    before = digests(tmp_path)
    with pytest.raises(NonFiniteWeight):
        patch(open_checkpoint(model), [adapter(QUERY), overflowing()], tmp_path / "undo", {}, "")
    assert digests(tmp_path) == before


def test_files_that_others_use_are_refused(model: Path, tmp_path: Path) -> None:
    shard = next(file for file in sorted(model.glob("*.safetensors")))
    os.link(shard, tmp_path / "twin")
    before = digests(tmp_path)
    with pytest.raises(CheckpointError, match="hard link"):
        patch(open_checkpoint(model), [adapter(QUERY)], tmp_path / "undo", {}, "")
    (tmp_path / "twin").unlink()
    shard.rename(tmp_path / "blob")
    shard.symlink_to(tmp_path / "blob")
    with pytest.raises(CheckpointError, match="link to a file of a cache"):
        patch(open_checkpoint(model), [adapter(QUERY)], tmp_path / "undo", {}, "")
    shard.unlink()
    (tmp_path / "blob").rename(shard)
    shard.chmod(0o444)
    with pytest.raises(CheckpointError, match="read-only"):
        patch(open_checkpoint(model), [adapter(QUERY)], tmp_path / "undo", {}, "")
    assert {name for name in before if name != "twin"} == set(digests(tmp_path))


def test_undo_files_are_checked(model: Path, tmp_path: Path) -> None:
    undo = tmp_path / "undo"
    patched(model, undo)
    after = digests(model)
    whole = undo.read_bytes()
    undo.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="is damaged"):
        unpatched(model, undo)
    undo.write_bytes(whole)
    patch(open_checkpoint(model), [adapter(QUERY, seed=1)], tmp_path / "second", {}, "others")
    with pytest.raises(CheckpointError, match="merged in place again"):
        unpatched(model, undo)
    unpatched(model, tmp_path / "second")
    assert digests(model) == after
    with pytest.raises(CheckpointError, match="exists, and is not"):
        patch(open_checkpoint(model), [adapter(QUERY, seed=1)], undo, {}, "others")
    with pytest.raises(CheckpointError, match="in the model's directory"):
        patch(open_checkpoint(model), [adapter(QUERY, seed=1)], model / "undo", {}, "others")
