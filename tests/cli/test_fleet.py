"""`merge --adapters-from` and `--share-untouched`: a model of each adapter, and weights that are written once."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import peftsurgery as ps
from peftsurgery.commands import fleet, fleet_pass
from peftsurgery.disk import durable
from peftsurgery.disk.checkpoint import INDEX, open_checkpoint
from peftsurgery.disk.lock import locked
from peftsurgery.errors import CheckpointError, DiskError, FleetError, PlanError
from peftsurgery.events import Event
from tests.cli.conftest import adapter_for, digest
from tests.strike import CHANGES, points

Run = Callable[..., Result]
TARGETS = {"ada": "q_proj,v_proj", "bob": "q_proj,v_proj", "cleo": "all-linear"}


def no_reflink(source: Path, target: Path) -> bool:
    return False


@pytest.fixture(autouse=True)
def _hard_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """On every file system, so that inodes tell what is shared."""
    monkeypatch.setattr(durable, "_reflinked", no_reflink)


@pytest.fixture(scope="module")
def adapters(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters that touch the same weights, and one that touches more."""
    room = tmp_path_factory.mktemp("adapters")
    for seed, (name, targets) in enumerate(TARGETS.items()):
        adapter_for(AutoModelForCausalLM.from_pretrained(llama), targets, room / name)
        changed(room / name, lambda tensor, by=seed + 1: tensor * by)
    return room


@pytest.fixture(scope="module")
def single(llama: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a merge of each adapter by itself writes."""
    room = tmp_path_factory.mktemp("single")
    for name in TARGETS:
        ps.merge(llama, adapters / name, out=room / name)
    return room


def changed(adapter: Path, by: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """The adapter with its B matrices changed."""
    file = adapter / "adapter_model.safetensors"
    held = {name: by(tensor) if "lora_B" in name else tensor for name, tensor in load_file(file).items()}
    save_file(held, file, metadata={"format": "pt"})
    return adapter


def overflowing(tensor: torch.Tensor) -> torch.Tensor:
    """Finite, and what it folds to is not."""
    return torch.full_like(tensor, 3e38)


def weights(model: Path) -> dict[str, torch.Tensor]:
    """What a loader holds that reads every weight file, whatever the index says; no name twice."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(model.glob("model*.safetensors")):
        more = load_file(file)
        assert not found.keys() & more.keys()
        found |= more
    return found


def assert_same(model: Path, other: Path) -> None:
    mine, theirs = weights(model), weights(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


def names(path: Path) -> list[str]:
    return sorted(found.name for found in path.iterdir())


def models(out: Path) -> list[str]:
    """What a user sees there."""
    return [name for name in names(out) if not name.startswith(".")] if out.exists() else []


def inodes(model: Path) -> set[int]:
    return {file.stat().st_ino for file in model.glob("*.safetensors")}


@pytest.mark.parametrize("together", [1, 16])
def test_every_model_is_that_of_a_merge_by_itself(
    run: Run,
    llama: Path,
    adapters: Path,
    single: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    together: int,
) -> None:
    monkeypatch.setattr(fleet, "TOGETHER", together)
    lines = [f"{name}={adapters / name}" for name in TARGETS]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    result = run("merge", llama, "--adapters-from", tmp_path / "list.txt", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    assert models(tmp_path / "out") == sorted(TARGETS)
    for name in TARGETS:
        assert digest(tmp_path / "out" / name) == digest(single / name)
    report = json.loads(result.stdout)
    assert [model["name"] for model in report["models"]] == list(TARGETS)
    assert (report["merged"], report["failed"]) == (3, [])


def test_untouched_weights_are_written_once(
    run: Run, llama: Path, adapters: Path, single: Path, tmp_path: Path
) -> None:
    words = ("merge", llama, "--adapters-from", adapters, "--share-untouched", "-o")
    result = run(*words, tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    for name in TARGETS:
        assert_same(tmp_path / "out" / name, single / name)
    ada, bob, cleo = (inodes(tmp_path / "out" / name) for name in TARGETS)
    assert len(ada & bob) == len(ada) - 1, "all but the file of what the adapter touches"
    assert ada & cleo and len(ada & cleo) < len(ada & bob)
    told = {model["name"]: model for model in json.loads(result.stdout)["models"]}
    touched = load_file(adapters / "ada" / "adapter_model.safetensors")
    assert 0 < told["ada"]["written"] < told["ada"]["shared"] and touched
    assert run(*words, tmp_path / "again").exit_code == 0
    assert digest(tmp_path / "again") == digest(tmp_path / "out"), "the files have the same names every time"


def test_transformers_loads_a_model_that_shares(llama: Path, adapters: Path, tmp_path: Path) -> None:
    ps.merge(llama, adapters_from=adapters, out=tmp_path / "out", share_untouched=True)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "ada", output_loading_info=True)
    assert not any(info.values()), info
    live = AutoModelForCausalLM.from_pretrained(llama)
    ps.merge(live, ps.load_adapter(adapters / "ada"))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), live.parameters(), strict=True))


@pytest.mark.parametrize("room", [fleet.ROOM, 0], ids=["held", "no room"])
def test_a_merge_is_prepared_once_where_memory_holds_it(
    llama: Path, adapters: Path, single: Path, tmp_path: Path, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: list[str] = []
    prepare = fleet_pass.prepare
    monkeypatch.setattr(fleet, "ROOM", room)
    monkeypatch.setattr(fleet_pass, "prepare", lambda job: prepared.append(job.out.name) or prepare(job))
    ps.merge(llama, adapters_from=adapters, out=tmp_path / "out", share_untouched=True)
    assert sorted(prepared) == sorted([*TARGETS] * (1 if room else 2))
    for name in TARGETS:
        assert_same(tmp_path / "out" / name, single / name)


def test_a_later_adapter_shares_with_the_earlier_ones(llama: Path, adapters: Path, tmp_path: Path) -> None:
    def merge(name: str) -> None:
        ps.merge(llama, adapters_from={name: adapters / name}, out=tmp_path / "out", share_untouched=True)

    merge("ada")
    merge("bob")
    assert len(inodes(tmp_path / "out" / "ada") & inodes(tmp_path / "out" / "bob")) > 1


def test_another_base_in_the_same_place_shares_nothing(llama: Path, adapters: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(llama, tmp_path / "base"))

    def merge(name: str) -> set[int]:
        ps.merge(base, adapters_from={name: adapters / name}, out=tmp_path / "out", share_untouched=True)
        return inodes(tmp_path / "out" / name)

    first = merge("ada")
    for file in base.glob("*.safetensors"):
        held = {name: tensor + 1 for name, tensor in load_file(file).items()}
        save_file(held, file, metadata={"format": "pt"})
    assert not first & merge("bob")
    ps.merge(base, adapters / "bob", out=tmp_path / "single")
    assert_same(tmp_path / "out" / "bob", tmp_path / "single")


def test_a_shared_file_is_not_patched(run: Run, llama: Path, adapters: Path, tmp_path: Path) -> None:
    ps.merge(llama, adapters_from=adapters, out=tmp_path / "out", share_untouched=True)
    before = digest(tmp_path / "out" / "bob")
    shared = [file for file in (tmp_path / "out" / "bob").glob("*.safetensors") if file.stat().st_nlink > 1]
    assert shared and all(file.stat().st_mode & 0o222 == 0 for file in shared)
    words = ("--in-place", "--undo", tmp_path / "undo")
    result = run("merge", tmp_path / "out" / "ada", adapters / "cleo", *words)
    assert result.exit_code == 1 and "hard link" in result.stderr
    assert digest(tmp_path / "out" / "bob") == before


def reflinked(source: Path, target: Path) -> bool:
    """As a file system does it that can: a file of its own with the same bytes."""
    shutil.copyfile(source, target)
    return True


def test_a_reflink_is_a_file_of_its_own(
    llama: Path, adapters: Path, single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "_reflinked", reflinked)
    report = ps.merge(llama, adapters_from=adapters, out=tmp_path / "out", share_untouched=True)
    assert report.facts["shared by"] == ["reflink"]
    assert models(tmp_path / "out") == names(tmp_path / "out")[-3:]
    assert ".shared" not in names(tmp_path / "out"), "no model needs it any longer"
    for name in TARGETS:
        assert_same(tmp_path / "out" / name, single / name)
        modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "out" / name).glob("*.safetensors")}
        assert modes == {file.stat().st_mode & 0o777 for file in llama.glob("*.safetensors")}


def no_link(*names: object, **words: object) -> None:
    raise OSError(1, "Operation not permitted")


@pytest.mark.parametrize("share", [False, True])
def test_one_that_fails_leaves_the_others_alone(
    run: Run, llama: Path, adapters: Path, single: Path, tmp_path: Path, share: bool
) -> None:
    room = Path(shutil.copytree(adapters, tmp_path / "adapters"))
    changed(Path(shutil.copytree(adapters / "ada", room / "nan")), lambda tensor: tensor * float("nan"))
    changed(Path(shutil.copytree(adapters / "ada", room / "huge")), overflowing)
    changed(Path(shutil.copytree(adapters / "ada", room / "wide")), lambda tensor: tensor.repeat(2, 1))
    words = ["--share-untouched"] if share else []
    result = run("merge", llama, "--adapters-from", room, "-o", tmp_path / "out", *words)
    assert result.exit_code == 1
    assert "'huge', 'nan', 'wide' of 6 adapters could not be merged" in result.stderr
    assert "Merged 3 of 6" in result.stdout
    assert models(tmp_path / "out") == sorted(TARGETS)
    for name in TARGETS:
        assert_same(tmp_path / "out" / name, single / name)


def test_all_that_fail_leave_nothing(llama: Path, adapters: Path, tmp_path: Path) -> None:
    bad = changed(Path(shutil.copytree(adapters / "ada", tmp_path / "bad")), overflowing)
    with pytest.raises(FleetError) as caught:
        ps.merge(llama, adapters_from={"bad": bad}, out=tmp_path / "out" / "deep", share_untouched=True)
    assert caught.value.report.facts["failed"] == ["bad"]
    assert names(tmp_path) == ["bad"]


def test_interrupted(llama: Path, adapters: Path, single: Path, tmp_path: Path) -> None:
    def interrupt(event: Event) -> None:
        if event.verb == "merge":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="1 of 3 models are whole"):
        ps.merge(llama, adapters_from=adapters, out=tmp_path / "out", share_untouched=True, listen=interrupt)
    (whole,) = models(tmp_path / "out")
    assert_same(tmp_path / "out" / whole, single / whole)


class Stopped(BaseException):
    """What no code expects."""


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("after", [2, 5])
@pytest.mark.parametrize("how", [KeyboardInterrupt, Stopped])
def test_it_goes_on_where_it_stopped(
    run: Run,
    llama: Path,
    adapters: Path,
    tmp_path: Path,
    share: bool,
    after: int,
    how: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fleet, "TOGETHER", 2)
    words: dict[str, Any] = {"adapters_from": adapters, "share_untouched": share}
    ps.merge(llama, out=tmp_path / "plain", **words)
    made: list[str] = []

    def stop(event: Event) -> None:
        made.append(event.verb)
        if made.count("write") == 8 * after:
            raise how

    with pytest.raises(how):
        ps.merge(llama, out=tmp_path / "out", **words, listen=stop)
    before = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in models(tmp_path / "out")}
    flags = ["--share-untouched"] if share else []
    result = run("merge", llama, "--adapters-from", adapters, "-o", tmp_path / "out", "--resume", *flags)
    assert result.exit_code == 0, result.stderr
    assert digest(tmp_path / "out") == digest(tmp_path / "plain")
    assert names(tmp_path / "out") == names(tmp_path / "plain")
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == when for name, when in before.items())


@pytest.mark.parametrize("how", ["kill", "torn"])
def test_a_fleet_that_is_killed_is_resumed(llama: Path, adapters: Path, tmp_path: Path, how: str) -> None:
    """No loader finds a half written model, and going on gives the bits of a run that was not killed."""
    words: dict[str, Any] = {"adapters_from": adapters, "share_untouched": True}
    plain, out = tmp_path / "plain", tmp_path / "out"
    ps.merge(llama, out=plain, **words)
    stopped = 0
    for _ in points(lambda: ps.merge(llama, out=out, **words), how, (*CHANGES, "link"), step=61):
        stopped += 1
        assert all(digest(out / name) == digest(plain / name) for name in models(out))
        ps.merge(llama, out=out, **words, resume=True)
        assert digest(out) == digest(plain) and names(out) == names(plain)
        shutil.rmtree(out)
    assert stopped > 2


def test_a_longer_list_goes_on_from_a_shorter_one(
    run: Run, llama: Path, adapters: Path, single: Path, tmp_path: Path
) -> None:
    ps.merge(llama, adapters_from={"ada": adapters / "ada"}, out=tmp_path / "out")
    words = ("merge", llama, "--adapters-from", adapters, "-o", tmp_path / "out")
    refused = run(*words)
    assert refused.exit_code == 1 and "--resume" in refused.stderr
    result = run(*words, "--resume", "--json")
    assert result.exit_code == 0, result.stderr
    assert [model["before"] for model in json.loads(result.stdout)["models"]] == [True, False, False]
    assert all(digest(tmp_path / "out" / name) == digest(single / name) for name in TARGETS)


def test_another_merge_in_a_models_place_is_left_alone(
    run: Run, llama: Path, adapters: Path, single: Path, tmp_path: Path
) -> None:
    room = Path(shutil.copytree(adapters, tmp_path / "adapters"))
    ps.merge(llama, adapters_from={"ada": room / "ada"}, out=tmp_path / "out")
    changed(room / "ada", lambda tensor: tensor + 1)
    result = run("merge", llama, "--adapters-from", room, "-o", tmp_path / "out", "--resume")
    assert result.exit_code == 1 and "another base or adapter" in result.stderr
    assert models(tmp_path / "out") == sorted(TARGETS)
    assert all(digest(tmp_path / "out" / name) == digest(single / name) for name in TARGETS)


@pytest.mark.parametrize("share", [False, True])
def test_a_full_disk_stops_all(
    run: Run,
    llama: Path,
    adapters: Path,
    tmp_path: Path,
    share: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words: dict[str, Any] = {"adapters_from": adapters, "share_untouched": share}
    ps.merge(llama, out=tmp_path / "plain", **words)
    calls: list[object] = []

    def full(*about: object) -> None:
        calls.append(about)
        if len(calls) > 40:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(durable.os, "fsync", full)
    with pytest.raises(DiskError, match="No space left"):
        ps.merge(llama, out=tmp_path / "out", **words)
    monkeypatch.undo()
    ps.merge(llama, out=tmp_path / "out", **words, resume=True)
    assert digest(tmp_path / "out") == digest(tmp_path / "plain")


def test_one_fleet_at_a_time(llama: Path, adapters: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "out" / ".shared" / "theirs.safetensors"
    theirs.parent.mkdir(parents=True)
    theirs.touch()
    with locked(tmp_path / "out", "merging"), pytest.raises(CheckpointError, match="Another process"):
        ps.merge(llama, adapters_from=adapters, out=tmp_path / "out", share_untouched=True)
    assert names(tmp_path / "out") == [".shared"] and theirs.exists()


@pytest.mark.parametrize("text", ["", "[]", '{"models": 3}'])
def test_a_journal_that_is_none(llama: Path, adapters: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / ".fleet.json").write_text(text)
    with pytest.raises(CheckpointError, match="cannot be understood"):
        ps.merge(llama, adapters_from=adapters, out=tmp_path, resume=True)
    assert names(tmp_path) == [".fleet.json"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"adapters": "ADAPTER"}, "one of the two"),
        ({"weight": (1.0, 2.0)}, "one `--weight`"),
        ({"in_place": True, "undo": "UNDO"}, "`--adapters-from` is for a checkpoint"),
    ],
)
def test_words_that_do_not_go_together(
    llama: Path, adapters: Path, tmp_path: Path, words: dict[str, Any], said: str
) -> None:
    out = {} if "in_place" in words else {"out": tmp_path / "out"}
    with pytest.raises(PlanError, match=said):
        ps.merge(llama, adapters_from=adapters, **words, **out)
    assert names(tmp_path) == []


def test_a_place_that_is_taken(llama: Path, adapters: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "bob").mkdir(parents=True)
    (tmp_path / "out" / "bob" / "mine.txt").touch()
    with pytest.raises(PlanError, match="'bob' already"):
        ps.merge(llama, adapters_from=adapters, out=tmp_path / "out")
    assert names(tmp_path / "out") == ["bob"]


@pytest.fixture
def lopsided(tmp_path: Path) -> tuple[Path, Path]:
    """A base with a file that the adapter touches and one that it does not, and the adapter."""
    torch.manual_seed(0)
    words: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 99}
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_hidden_layers=2, intermediate_size=48, **words))
    base = tmp_path / "base"
    model.save_pretrained(base)
    held = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    files = {"model-00001-of-00002.safetensors": "q_proj", "model-00002-of-00002.safetensors": ""}
    places: dict[str, str] = {}
    for file, word in files.items():
        some = {name: held.pop(name) for name in list(held) if word in name}
        save_file(some, base / file, metadata={"format": "pt"})
        places |= dict.fromkeys(some, file)
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return base, adapter_for(AutoModelForCausalLM.from_pretrained(base), "q_proj", tmp_path / "adapter")


def test_a_single_merge_links_whole_files_of_its_base(
    run: Run, lopsided: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = lopsided
    ps.merge(base, adapter, out=tmp_path / "plain")
    result = run("merge", base, adapter, "-o", tmp_path / "out", "--share-untouched", "--json")
    assert result.exit_code == 0, result.stderr
    assert_same(tmp_path / "out", tmp_path / "plain")
    (shared,) = inodes(tmp_path / "out") & inodes(base)
    assert shared == (base / "model-00002-of-00002.safetensors").stat().st_ino
    assert json.loads(result.stdout)["shared by"] == ["hard link"]
    other = ("--dtype", "bfloat16")
    assert run("merge", base, adapter, "-o", tmp_path / "cast", "--share-untouched", *other).exit_code == 0
    assert not inodes(tmp_path / "cast") & inodes(base)


@pytest.mark.parametrize("cached", [False, True])
def test_what_cannot_be_linked_is_written_and_said(
    run: Run, lopsided: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    base, adapter = lopsided
    ps.merge(base, adapter, out=tmp_path / "plain")
    if cached:
        (tmp_path / "blobs").mkdir()
        for file in base.glob("*.safetensors"):
            file.rename(tmp_path / "blobs" / file.name)
            file.symlink_to(tmp_path / "blobs" / file.name)
    if not cached:
        monkeypatch.setattr(durable.os, "link", no_link)
    result = run("merge", base, adapter, "-o", tmp_path / "out", "--share-untouched", "--json")
    assert result.exit_code == 0, result.stderr
    why = "symbolic link" if cached else "not permitted"
    assert why in json.loads(result.stdout)["not shared because"][0]
    assert digest(tmp_path / "out") == digest(tmp_path / "plain")
    assert len(open_checkpoint(tmp_path / "out").shards) == 2
