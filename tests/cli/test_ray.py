"""`merge --engine ray` on a Ray of this machine: the same bits, also when a worker is killed or the user stops it."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from transformers import AutoModelForCausalLM

import peftsurgery as ps
from peftsurgery.commands.fitting import fit
from peftsurgery.disk import on_ray
from peftsurgery.disk.checkpoint import open_checkpoint
from peftsurgery.disk.engines import Failed
from peftsurgery.disk.merge import plan
from peftsurgery.disk.writer import ShardDone, ShardTask, write_shard
from peftsurgery.errors import CheckpointError, NonFiniteWeight
from peftsurgery.events import Event
from tests.cli.conftest import adapter_for, digest

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.ray
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def workers() -> Iterator[None]:
    """A Ray with three workers, to which this process is connected."""
    room = {"object_store_memory": on_ray.STORE, "num_cpus": 3}
    ray.init("local", include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False, **room)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def adapter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = AutoModelForCausalLM.from_pretrained(llama)
    return adapter_for(model, "q_proj,v_proj", tmp_path_factory.mktemp("adapters") / "adapter")


@pytest.fixture(scope="module")
def expected(llama: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the local engine writes."""
    out = tmp_path_factory.mktemp("local") / "out"
    ps.merge(llama, adapter, out=out)
    assert len(open_checkpoint(out).shards) > 1
    return digest(out)


def killed_once(task: ShardTask) -> ShardDone | Failed:
    """Dies in the middle of its file the first time; every file has its own first time."""
    died = task.file.parents[1] / f"died-{task.file.name}"

    def die(event: Event) -> None:
        if not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    if task.file.name.startswith("model-00002"):
        write_shard(task, die)
    return on_ray.attempt(task)


def nowhere(task: ShardTask) -> ShardDone:
    """Writes where nobody looks."""
    return ShardDone(task.file, task.nbytes, {})


def overflows(task: ShardTask) -> Failed:
    return Failed(task.file, NonFiniteWeight("It overflowed. Nothing was kept.", tensor="q"))


def breaks(task: ShardTask) -> ShardDone:
    raise ZeroDivisionError(task.file.name)


def test_the_bits_are_the_same(
    workers: None, llama: Path, adapter: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    told: list[Event] = []
    ps.merge(llama, adapter, out=tmp_path / "out", engine="ray", listen=told.append)
    assert digest(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for verb in ("fold", "write"):
        steps = [event for event in told if event.verb == verb]
        assert [event.done for event in steps] == list(range(1, steps[0].total + 1))
    assert ray.is_initialized()


def test_a_killed_worker_is_replaced(
    workers: None,
    llama: Path,
    adapter: Path,
    tmp_path: Path,
    expected: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(on_ray, "RUNS", killed_once)
    ps.merge(llama, adapter, out=tmp_path / "out", engine="ray")
    assert [path.name for path in tmp_path.glob("died-*")]
    assert digest(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("runs", "error", "said"),
    [
        (overflows, NonFiniteWeight, "It overflowed"),
        (nowhere, CheckpointError, "another file system"),
        (breaks, CheckpointError, "ZeroDivisionError"),
    ],
)
def test_what_fails_leaves_nothing(
    runs: Callable[[ShardTask], object],
    error: type[Exception],
    said: str,
    workers: None,
    llama: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(on_ray, "RUNS", runs)
    with pytest.raises(error, match=said):
        ps.merge(llama, adapter, out=tmp_path / "out", engine="ray")
    assert list(tmp_path.iterdir()) == []


def test_stopping_it_stops_the_workers(workers: None, llama: Path, adapter: Path, tmp_path: Path) -> None:
    def interrupt(event: Event) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ps.merge(llama, adapter, out=tmp_path / "out", engine="ray", listen=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_fleet_shares_there_too(workers: None, llama: Path, adapter: Path, tmp_path: Path) -> None:
    names = {"one": adapter, "two": Path(shutil.copytree(adapter, tmp_path / "adapter"))}
    words: dict[str, Any] = {"adapters_from": names, "share_untouched": True}
    ps.merge(llama, out=tmp_path / "local", **words)
    report = ps.merge(llama, out=tmp_path / "ray", engine="ray", **words)
    assert digest(tmp_path / "ray") == digest(tmp_path / "local")
    assert report.facts["shared by"] in (["hard link"], ["reflink"])
    assert {path.name for path in tmp_path.rglob(".*")} == {".shared", ".fleet.json"}


def test_a_task_carries_what_its_file_needs_of_the_adapter(
    llama: Path, adapter: Path, tmp_path: Path
) -> None:
    """And no weight of the base: what it is made from is named."""
    checkpoint = open_checkpoint(llama)
    fitted = fit(checkpoint, [ps.load_adapter(adapter)], task=None, untie=False, trust_remote_code=False)
    tasks = plan(checkpoint, fitted.adapters, tmp_path).tasks
    needed = sum(tensor.nbytes for _, tensor in fitted.adapters[0].tensors())
    assert needed < sum(len(pickle.dumps(task)) for task in tasks) < needed + 20_000 * len(tasks)


def test_a_ray_of_its_own_is_gone_afterwards(
    run: Run, llama: Path, adapter: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    ray.shutdown()
    result = run("merge", llama, adapter, "-o", tmp_path / "out", "--engine", "ray")
    assert result.exit_code == 0, result.stderr
    assert digest(tmp_path / "out") == expected
    assert not ray.is_initialized()


def test_a_cluster_that_is_not_there(
    run: Run, llama: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "no-such-word")
    result = run("merge", llama, adapter, "-o", tmp_path / "out", "--engine", "ray")
    assert result.exit_code == 1 and "RAY_ADDRESS" in result.stderr
    assert list(tmp_path.iterdir()) == []
