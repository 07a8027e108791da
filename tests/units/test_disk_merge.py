"""Merging on disk: the same files with the adapter in them, or an error and nothing."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from peftsurgery.adapter import Adapter
from peftsurgery.disk.checkpoint import INDEX, open_checkpoint
from peftsurgery.disk.durable import staged
from peftsurgery.disk.merge import Merged
from peftsurgery.disk.pieces import BLOCK
from peftsurgery.disk.rooms import Room
from peftsurgery.errors import (
    CheckpointError,
    MismatchedTensors,
    NonFiniteWeight,
    SurgeryError,
    UnclaimedSites,
    UnsupportedSite,
)
from peftsurgery.events import Event
from peftsurgery.methods.lora import LoRA
from peftsurgery.planning import Plan, Step
from peftsurgery.rename import Rename
from peftsurgery.site import Kind, Layout, Site
from tests.merging import merge

QUERY = Site("layer.0.query", Kind.LINEAR, (6, 8))
MIX = Site("layer.1.c_attn", Kind.LINEAR, (8, 12), Layout.IN_OUT)
TABLE = Site("embed_tokens", Kind.EMBEDDING, (10, 8), Layout.IN_OUT)
Changes = Mapping[str, Tensor]


def base_tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(1)
    shapes = {TABLE.weight: TABLE.shape, QUERY.weight: QUERY.shape, QUERY.bias: (6,), MIX.weight: MIX.shape}
    found = {name: torch.randn(shape, generator=chance).to(dtype) for name, shape in shapes.items()}
    return {**found, "position_ids": torch.arange(5)}


def base(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    """A checkpoint of one file."""
    path.mkdir()
    save_file(dict(tensors), path / "model.safetensors", metadata={"format": "pt", "note": "kept"})
    return path


def sharded(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    """A checkpoint of two files, and a stale third one."""
    path.mkdir()
    names = list(tensors)
    files = {"model-00001-of-00002.safetensors": names[:2], "model-00002-of-00002.safetensors": names[2:]}
    for file, held in files.items():
        save_file(
            {name: tensors[name] for name in held}, path / file, metadata={"format": "pt", "file": file}
        )
    places = {name: file for file, held in files.items() for name in held}
    metadata = {"total_size": 3, "total_parameters": 4, "note": "kept"}
    (path / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": places}))
    save_file({"stale": torch.ones(1)}, path / "model-00003-of-00003.safetensors")
    return path


def adapter(*sites: Site, seed: int = 0, replaced: Changes | None = None, **options: Any) -> Adapter:
    method, chance = LoRA(r=2, lora_alpha=3, **options), torch.Generator().manual_seed(seed)
    params = {
        site.name: {name: torch.randn(shape, generator=chance) for name, shape in method.shapes(site).items()}
        for site in sites
    }
    return Adapter(Plan(tuple(Step(site, method) for site in sites)), params, replaced=replaced or {})


def expected(tensor: Tensor, site: Site, *adapters: Adapter) -> Tensor:
    """W + s·B·A, written out here."""
    value = tensor.float()
    for one in adapters:
        a, b = one.params[site.name].values()
        delta = (b @ a) * 1.5
        value = value + (delta if site.layout is Layout.OUT_IN else delta.t())
    return value.to(tensor.dtype)


def merged(path: Path, *adapters: Adapter, **options: Any) -> tuple[Merged, dict[str, Tensor]]:
    out = path.parent / "out"
    with staged(out) as directory:
        done = merge(open_checkpoint(path), adapters, directory, **options)
    return done, {
        name: t for file in done.files if file != INDEX for name, t in load_file(out / file).items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [base, sharded])
def test_only_what_the_adapter_names_changes(
    layout: Callable[[Path, Mapping[str, Tensor]], Path], dtype: torch.dtype, tmp_path: Path
) -> None:
    before, one = base_tensors(dtype), adapter(QUERY, MIX, TABLE)
    done, after = merged(layout(tmp_path / "base", before), one)
    assert after.keys() == before.keys()
    for site in (QUERY, MIX, TABLE):
        assert torch.equal(after[site.weight], expected(before[site.weight], site, one))
        assert after[site.weight].dtype is dtype
    assert torch.equal(after[QUERY.bias], before[QUERY.bias])
    assert torch.equal(after["position_ids"], before["position_ids"])
    assert (set(done.folded), done.added) == ({QUERY.weight, MIX.weight, TABLE.weight}, ())
    assert (done.nbytes, done.num_tensors) == (sum(t.nbytes for t in before.values()), len(before))


def test_a_single_file_keeps_its_order_and_metadata(tmp_path: Path) -> None:
    path = base(tmp_path / "base", base_tensors())
    done, _ = merged(path, adapter(QUERY))
    assert done.files == ("model.safetensors",)
    assert os.listdir(tmp_path / "out") == ["model.safetensors"]
    ours, theirs = (safe_open(where / "model.safetensors", "pt") for where in (tmp_path / "out", path))
    with ours as new, theirs as old:
        assert new.offset_keys() == old.offset_keys()
        assert new.metadata() == old.metadata() == {"format": "pt", "note": "kept"}


def test_shards_and_their_index_stay(tmp_path: Path) -> None:
    before = base_tensors()
    path = sharded(tmp_path / "base", before)
    head = torch.randn(3, 8)
    done, after = merged(path, adapter(QUERY, replaced={"classifier.weight": head}))
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    old = json.loads((path / INDEX).read_text())
    assert index["weight_map"] == {
        **old["weight_map"],
        "classifier.weight": "model-00002-of-00002.safetensors",
    }
    assert index["metadata"] == {
        "total_size": sum(tensor.nbytes for tensor in after.values()),
        "total_parameters": sum(tensor.numel() for tensor in after.values()),
        "note": "kept",
    }
    assert set(done.files) == set(os.listdir(tmp_path / "out")) == {*old["weight_map"].values(), INDEX}
    found = open_checkpoint(tmp_path / "out")
    assert [shard.metadata["file"] for shard in found.shards] == [shard.file.name for shard in found.shards]


def test_a_head_that_the_base_lacks_is_added_in_the_bases_dtype(tmp_path: Path) -> None:
    head = {"classifier.weight": torch.randn(3, 8), "classifier.steps": torch.tensor(70_000)}
    done, after = merged(base(tmp_path / "base", base_tensors(torch.bfloat16)), adapter(QUERY, replaced=head))
    assert done.added == tuple(head)
    assert torch.equal(after["classifier.weight"], head["classifier.weight"].to(torch.bfloat16))
    assert torch.equal(after["classifier.steps"], head["classifier.steps"])
    assert after["classifier.steps"].dtype is torch.int64


def test_a_head_that_the_base_has_is_replaced(tmp_path: Path) -> None:
    bias = torch.randn(6)
    done, after = merged(
        base(tmp_path / "base", base_tensors(torch.float16)), adapter(QUERY, replaced={QUERY.bias: bias})
    )
    assert torch.equal(after[QUERY.bias], bias.half())
    assert (set(done.folded), done.added) == ({QUERY.weight, QUERY.bias}, ())


def test_tensors_get_the_outputs_names(tmp_path: Path) -> None:
    """A base saved as `BertModel` becomes the head model that the adapter was trained on."""
    before = base_tensors()
    site = Site(f"bert.{QUERY.name}", Kind.LINEAR, QUERY.shape)
    one = adapter(site, replaced={"classifier.bias": torch.ones(3)})
    done, after = merged(base(tmp_path / "base", before), one, rename=Rename(adds="bert"))
    assert after.keys() == {*(f"bert.{name}" for name in before), "classifier.bias"}
    assert torch.equal(after[site.weight], expected(before[QUERY.weight], site, one))
    assert done.folded == (site.weight,)


def test_a_twin_that_is_tied_no_longer_is_written_out(tmp_path: Path) -> None:
    before, head = base_tensors(), Site("lm_head", Kind.LINEAR, TABLE.shape)
    one = adapter(head)
    done, after = merged(sharded(tmp_path / "base", before), one, twins={head.weight: TABLE.weight})
    assert torch.equal(after[head.weight], expected(before[TABLE.weight], head, one))
    assert torch.equal(after[TABLE.weight], before[TABLE.weight])
    assert (done.folded, done.added) == ((head.weight,), (head.weight,))
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' cannot be untied from 'ghost'"):
        merge(open_checkpoint(tmp_path / "base"), [one], tmp_path, twins={head.weight: "ghost"})


def test_a_dtype_is_for_every_floating_tensor(tmp_path: Path) -> None:
    before, head = base_tensors(torch.bfloat16), Site("lm_head", Kind.LINEAR, TABLE.shape)
    one = adapter(QUERY, replaced={"classifier.weight": torch.randn(3, 8)})
    _, after = merged(
        base(tmp_path / "base", before), one, dtype=torch.float32, twins={head.weight: TABLE.weight}
    )
    assert torch.equal(after[QUERY.weight], expected(before[QUERY.weight].float(), QUERY, one))
    assert torch.equal(after["classifier.weight"], one.replaced["classifier.weight"])
    assert torch.equal(after[head.weight], before[TABLE.weight].float())
    assert {name for name, tensor in after.items() if tensor.dtype is not torch.float32} == {"position_ids"}


@pytest.mark.parametrize("layout", [base, sharded])
def test_files_are_cut_as_one_asks(
    layout: Callable[[Path, Mapping[str, Tensor]], Path], tmp_path: Path
) -> None:
    """In the order of their bytes; what is larger than a file has one for itself."""
    before, one = base_tensors(), adapter(QUERY, MIX, replaced={"classifier.weight": torch.ones(3, 8)})
    path = layout(tmp_path / "base", before)
    whole = merged(path, one)[1]
    (tmp_path / "out").rename(tmp_path / "whole")
    for size, counts in ((1, {6}), (300, {4, 5}), (10**9, {1})):
        done, after = merged(path, one, max_shard_size=size)
        assert all(torch.equal(after[name], whole[name]) for name in (*before, "classifier.weight"))
        found = open_checkpoint(tmp_path / "out")
        held = [shard.tensors for shard in found.shards]
        assert len(held) in counts
        assert found.indexed == (INDEX in done.files) == (len(held) > 1)
        assert all(len(t) == 1 or sum(stored.nbytes for stored in t) <= size for t in held)
        assert [stored.name for t in held for stored in t] == [
            *(stored.name for stored in open_checkpoint(path).tensors.values()),
            "classifier.weight",
        ]
        assert {*done.files} == {*os.listdir(tmp_path / "out")}
        shutil.rmtree(tmp_path / "out")


def test_several_adapters_are_summed_before_the_one_rounding(tmp_path: Path) -> None:
    before, one, two = base_tensors(torch.bfloat16), adapter(QUERY), adapter(QUERY, MIX, seed=1)
    _, after = merged(base(tmp_path / "base", before), one, two)
    assert torch.equal(after[QUERY.weight], expected(before[QUERY.weight], QUERY, one, two))
    assert torch.equal(after[MIX.weight], expected(before[MIX.weight], MIX, two))


def test_every_tensor_is_told_as_it_is_written(tmp_path: Path) -> None:
    told: list[Event] = []
    before = base_tensors()
    done, _ = merged(sharded(tmp_path / "base", before), adapter(QUERY, MIX), listen=told.append)
    writes = [event for event in told if event.verb == "write"]
    assert [event.done for event in writes] == list(range(1, done.num_tensors + 1))
    assert {event.total for event in writes} == {done.num_tensors}
    assert sum(event.nbytes for event in writes) == done.nbytes
    assert [event.name for event in told if event.verb == "fold"] == [QUERY.weight, MIX.weight]


def test_no_more_than_a_block_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    lay = Room.lay

    def watched(self: Room, nbytes: int, start: int = 0) -> Tensor:
        asked.append(nbytes)
        return lay(self, nbytes, start)

    monkeypatch.setattr(Room, "lay", watched)
    sites = [Site(name, Kind.LINEAR, (3000, 512)) for name in ("one", "two", "three")]
    before = {site.weight: torch.randn(site.shape) for site in sites}
    _, after = merged(sharded(tmp_path / "base", before), adapter(*sites[1:]))
    assert BLOCK // 2 < max(asked) <= BLOCK < before["one.weight"].nbytes
    for site in sites[1:]:
        assert torch.equal(after[site.weight], expected(before[site.weight], site, adapter(*sites[1:])))


def packed(**more: Tensor) -> dict[str, Tensor]:
    """The base with its query quantised in some way."""
    kept = {name: tensor for name, tensor in base_tensors().items() if name != QUERY.weight}
    return {
        **kept,
        **{f"{QUERY.name}.{name.replace('__', '.')}": tensor.clone() for name, tensor in more.items()},
    }


INT, SCALE, FLOAT = torch.ones(6, 8, dtype=torch.int32), torch.ones(6), torch.ones(6, 8)
QUANTISED = {
    "gptq": packed(qweight=INT, qzeros=INT, scales=SCALE),
    "int8": packed(weight=INT.to(torch.int8), SCB=SCALE),
    "4 bit": packed(
        weight=torch.ones(24, 1, dtype=torch.uint8), weight__absmax=SCALE, weight__quant_map=SCALE
    ),
    "fp8": packed(weight=FLOAT.to(torch.float8_e4m3fn), weight_scale_inv=SCALE),
    "fp8 alone": packed(weight=FLOAT.to(torch.float8_e4m3fn)),
    "compressed": packed(weight_packed=INT, weight_scale=SCALE),
}


@pytest.mark.parametrize("how", QUANTISED)
def test_a_quantised_base_is_refused(how: str, tmp_path: Path) -> None:
    message = r"'layer\.0\.query\.weight' is quantised .*Merge into the unquantised base"
    path = base(tmp_path / "base", QUANTISED[how])
    refuses(path, adapter(QUERY), UnsupportedSite, message)
    refuses(path, adapter(replaced={QUERY.weight: FLOAT}), UnsupportedSite, message)


@pytest.mark.parametrize("how", [how for how in QUANTISED if how != "fp8 alone"])
def test_a_quantised_base_keeps_what_the_adapter_leaves_alone_but_takes_no_dtype(
    how: str, tmp_path: Path
) -> None:
    path = base(tmp_path / "base", QUANTISED[how])
    refuses(path, adapter(MIX), UnsupportedSite, "quantised", dtype=torch.float16)
    _, after = merged(path, adapter(MIX))
    for name, tensor in QUANTISED[how].items():
        if name != MIX.weight:
            assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8))


def test_what_the_base_lacks_is_named(tmp_path: Path) -> None:
    path = base(tmp_path / "base", base_tensors())
    one = adapter(QUERY, Site("layer.0.qeury", Kind.LINEAR, (6, 8)))
    error = refuses(
        path, one, UnclaimedSites, r"lacks 1 of the 2 tensors .*'layer\.0\.qeury\.weight'.*Nearest"
    )
    assert isinstance(error, UnclaimedSites)
    assert error.sites == ("layer.0.qeury.weight",)
    refuses(path, adapter(MIX, lora_bias=True), UnclaimedSites, r"'layer\.1\.c_attn\.bias'")


@pytest.mark.parametrize(
    "one",
    [
        adapter(Site(QUERY.name, Kind.LINEAR, (6, 9))),
        adapter(Site(QUERY.name, Kind.LINEAR, (8, 6))),
        adapter(replaced={QUERY.bias: torch.ones(7)}),
        adapter(MIX, lora_bias=True),
        adapter(Site("layer.1.c_attn", Kind.LINEAR, (12, 8))),
    ],
    ids=["size", "turned", "head", "bias", "layout"],
)
def test_another_shape_is_refused(one: Adapter, tmp_path: Path) -> None:
    tensors = {**base_tensors(), MIX.bias: torch.ones(8)}
    refuses(base(tmp_path / "base", tensors), one, MismatchedTensors, "nothing was written")


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    path = base(tmp_path / "base", {"a.weight": torch.ones(1), "x.a.weight": torch.ones(1)})
    refuses(path, adapter(), CheckpointError, r"both be called 'a\.weight'", rename=Rename(drops="x"))


def refuses(path: Path, one: Adapter, kind: type[SurgeryError], message: str, **options: Any) -> SurgeryError:
    """The error, which must come before anything at all is written."""
    before = digests(path.parent)
    out = path.parent / "staging"
    out.mkdir()
    with pytest.raises(kind, match=message) as caught:
        merge(open_checkpoint(path), [one], out, **options)
    out.rmdir()
    assert digests(path.parent) == before
    return caught.value


def digests(room: Path) -> dict[str, str]:
    """Everything below `room`, by its bytes."""
    return {
        str(file.relative_to(room)): hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
        for file in room.rglob("*")
    }


def fill_the_second_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds the disk full half-way through."""
    begun, write = [0], os.pwrite

    def full(descriptor: int, data: Any, start: int) -> int:
        begun[0] += start == 0
        if begun[0] == 2 and start > 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data, start)

    monkeypatch.setattr(os, "pwrite", full)


def interrupted(event: Event) -> None:
    if event.verb == "write" and event.done == 4:
        raise KeyboardInterrupt


def overflowing() -> Adapter:
    """An adapter that is finite and whose product is not."""
    one = adapter(MIX)
    big = {name: torch.full_like(tensor, 1e30) for name, tensor in one.params[MIX.name].items()}
    return Adapter(one.plan, {MIX.name: big})


FAILURES: dict[str, tuple[type[BaseException], Callable[[], Adapter], dict[str, Any]]] = {
    "disk full": (CheckpointError, lambda: adapter(QUERY, MIX), {}),
    "interrupted": (KeyboardInterrupt, lambda: adapter(QUERY, MIX), {"listen": interrupted}),
    "not finite": (NonFiniteWeight, overflowing, {}),
}


@contextmanager
def listing(directory: Path, found: list[str]) -> Iterator[None]:
    """Notes what lies in `directory` when the block ends, however it ends."""
    try:
        yield
    finally:
        found.extend(os.listdir(directory))


@pytest.mark.parametrize("why", FAILURES)
def test_what_fails_in_the_middle_leaves_no_trace(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error, build, options = FAILURES[why]
    path = sharded(tmp_path / "base", base_tensors())
    before = digests(tmp_path)
    if why == "disk full":
        fill_the_second_file(monkeypatch)
    halfway: list[str] = []
    with pytest.raises(error), staged(tmp_path / "out") as directory, listing(directory, halfway):
        merge(open_checkpoint(path), [build()], directory, **options)
    assert "model-00001-of-00002.safetensors" in halfway, "it failed before it wrote"
    assert digests(tmp_path) == before
