"""A checkpoint is read from its headers, and believed only as far as its files bear it out."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from peftsurgery.disk.checkpoint import load, open_checkpoint, sites, stream
from peftsurgery.disk.locate import locate
from peftsurgery.disk.shard import DTYPES, read_shard
from peftsurgery.errors import CheckpointError, MissingShard, TruncatedShard, UnsafePath
from peftsurgery.site import Kind, Layout, Site

TENSORS = {
    "a.weight": torch.arange(12.0).reshape(3, 4),
    "b.weight": torch.randn(5, 2).to(torch.bfloat16),
    "b.bias": torch.randn(5).to(torch.float16),
    "nothing": torch.empty(0, 3),
    "step": torch.tensor(7),
    "mask": torch.tensor([True, False, True]),
}
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def written(file: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file by hand: any header, any bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return file


def sharded(path: Path, shards: dict[str, dict[str, torch.Tensor]], **more: str) -> Path:
    """A directory of shards with the index that names them, and `more` entries of the index."""
    places = {name: file for file, tensors in shards.items() for name in tensors} | more
    for file, tensors in shards.items():
        save_file(tensors, path / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1, "made_by": "hand"}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def halves(path: Path, **more: str) -> Path:
    one, two = {"a.weight": torch.ones(2, 2)}, {"b.weight": torch.zeros(3), "c.weight": torch.ones(1)}
    return sharded(path, {"model-1.safetensors": one, "model-2.safetensors": two}, **more)


def test_every_tensor_is_what_safetensors_reads(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = open_checkpoint(tmp_path)
    assert (found.indexed, found.index, len(found.shards)) == (False, None, 1)
    assert found.nbytes == sum(tensor.nbytes for tensor in TENSORS.values())
    streamed = dict(stream(found))
    assert streamed.keys() == TENSORS.keys()
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(streamed[name], tensor), name
        assert (streamed[name].dtype, streamed[name].shape) == (tensor.dtype, tensor.shape)
        stored = found.tensors[name]
        assert (tmp_path / "model.safetensors").read_bytes()[stored.start : stored.stop] == raw_bytes(tensor)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).numpy())


@pytest.mark.parametrize("word", sorted(DTYPES))
def test_every_dtype_is_read_bit_for_bit(word: str, tmp_path: Path) -> None:
    data = bytes(range(64)) * 2
    size = DTYPES[word].itemsize
    entry = {"dtype": word, "shape": [128 // size], "data_offsets": [0, 128]}
    shard = read_shard(written(tmp_path / "x", {"t": entry}, data))
    tensor = load(shard.tensors[0])
    assert (tensor.dtype, tensor.shape) == (DTYPES[word], (128 // size,))
    assert raw_bytes(tensor) == data


def test_misaligned_tensors_are_read_right(tmp_path: Path) -> None:
    header = {
        "b": {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]},
        "t": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
    }
    data = b"\1\0\1" + raw_bytes(torch.tensor([1.5, -2.5]))
    shard = read_shard(written(tmp_path / "x", header, data))
    loaded = load(shard.tensors[1])
    assert torch.equal(loaded, torch.tensor([1.5, -2.5]))
    assert loaded.data_ptr() % 4 == 0


def test_what_is_done_to_a_loaded_tensor_never_reaches_the_file(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    for _, tensor in stream(open_checkpoint(tmp_path)):
        tensor.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    stored = open_checkpoint(tmp_path).tensors["b.weight"]
    os.truncate(tmp_path / "model.safetensors", 8)
    with pytest.raises(TruncatedShard, match="changed while it was being read"):
        load(stored)


def test_only_what_the_index_names_is_read(tmp_path: Path) -> None:
    halves(tmp_path)
    save_file({"a.weight": torch.full((2, 2), 666.0)}, tmp_path / "model.old.safetensors")
    found = open_checkpoint(tmp_path)
    assert [shard.file.name for shard in found.shards] == ["model-1.safetensors", "model-2.safetensors"]
    assert found.index == {"total_size": 1, "made_by": "hand"}
    assert found.indexed
    assert torch.equal(load(found.tensors["a.weight"]), torch.ones(2, 2))


def test_a_hub_caches_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots" / "main").mkdir(parents=True)
    halves(tmp_path / "blobs")
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshots" / "main" / file.name).symlink_to(f"../../blobs/{file.name}")
    found = open_checkpoint(tmp_path / "snapshots" / "main")
    assert list(found.tensors) == ["a.weight", "b.weight", "c.weight"]


HEADERS: dict[str, tuple[Any, bytes, int | None, str]] = {
    "nothing at all": (b"", b"", 0, "no JSON"),
    "2^60 bytes": ({"t": F32}, b"\0" * 8, 1 << 60, "announces a header of 1152921504606846976"),
    "half a header": ({"t": F32}, b"", 4000, "announces a header of 4000"),
    "no JSON": (b"{'t': 1}", b"", None, "no JSON"),
    "no UTF-8": (b'{"\xff": 1}', b"", None, "no JSON"),
    "a list": ([F32], b"", None, "no JSON object"),
    "too deep": (b"[" * 100_000, b"", None, "no JSON"),
    "twice the same": (
        b'{"t": {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}, "t": {}}',
        b"\0",
        None,
        "stands there twice",
    ),
    "no entry": ({"t": 3}, b"", None, "words that are not the format's"),
    "no shape": ({"t": {"dtype": "F32", "data_offsets": [0, 8]}}, b"\0" * 8, None, "words that are not"),
    "a negative size": ({"t": {**F32, "shape": [-2]}}, b"\0" * 8, None, "words that are not"),
    "a true size": (
        {"t": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}},
        b"\0",
        None,
        "words that",
    ),
    "one offset": ({"t": {**F32, "data_offsets": [8]}}, b"\0" * 8, None, "words that are not"),
    "offsets backwards": ({"t": {**F32, "data_offsets": [8, 0]}}, b"\0" * 8, None, "gives 't' -8 bytes"),
    "another size": ({"t": {**F32, "shape": [3]}}, b"\0" * 8, None, "which is not F32"),
    "out of bounds": ({"t": {**F32, "shape": [1 << 40]}}, b"\0" * 8, None, "which is not F32"),
    "shorter": ({"t": F32}, b"\0" * 7, None, "announces"),
    "longer": ({"t": F32}, b"\0" * 9, None, "announces"),
    "overlapping": ({"t": F32, "u": {**F32, "data_offsets": [4, 12]}}, b"\0" * 12, None, "'u' overlaps"),
    "the same bytes": ({"t": F32, "u": F32}, b"\0" * 8, None, "overlaps"),
    "a hole": ({"t": F32, "u": {**F32, "data_offsets": [12, 20]}}, b"\0" * 20, None, "'u' leaves a hole"),
    "metadata": ({"__metadata__": {"x": 1}, "t": F32}, b"\0" * 8, None, "metadata that are not strings"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_lies_is_refused(case: str, tmp_path: Path) -> None:
    header, data, length, message = HEADERS[case]
    file = written(tmp_path / "model.safetensors", header, data, length)
    with pytest.raises(TruncatedShard, match=message) as caught:
        open_checkpoint(tmp_path)
    assert str(file) in str(caught.value)
    with pytest.raises(SafetensorError):
        safe_open(file, "pt").__enter__()  # the format's own reader refuses it too


def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """A sparse file of 1 TiB with a header that fits in it."""
    file = written(tmp_path / "model.safetensors", b"{", length=1 << 39)
    os.truncate(file, 1 << 40)
    started = time.perf_counter()
    with pytest.raises(TruncatedShard, match="100000000 are the most"):
        open_checkpoint(tmp_path)
    assert time.perf_counter() - started < 1


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "whole.safetensors", metadata={"format": "pt"})
    whole = (tmp_path / "whole.safetensors").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(TruncatedShard):
            open_checkpoint(tmp_path)


def test_whatever_safetensors_refuses_is_refused(tmp_path: Path) -> None:
    """Random damage to a header is an error of ours, or leaves a file that the format's own reader takes."""
    save_file(TENSORS, tmp_path / "whole.safetensors", metadata={"format": "pt"})
    whole = (tmp_path / "whole.safetensors").read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    chance, refused = random.Random(0), 0
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            damaged[chance.randrange(end)] = chance.choice(b'0123456789{}[],:"FBU\x00\xff ')
        file = tmp_path / "damaged.safetensors"
        file.write_bytes(damaged)
        try:
            for stored in read_shard(file).tensors:
                load(stored)
        except CheckpointError:
            refused += 1
            continue
        with safe_open(file, "pt") as theirs:
            assert set(theirs.keys()) == {stored.name for stored in read_shard(file).tensors}
    assert 200 < refused < 400


def test_an_unknown_dtype_is_named(tmp_path: Path) -> None:
    entry = {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}
    written(tmp_path / "model.safetensors", {"packed": entry}, b"\0" * 8)
    with pytest.raises(CheckpointError, match="stores 'packed' as 'F4'"):
        open_checkpoint(tmp_path)


def test_more_axes_than_torch_takes_are_refused(tmp_path: Path) -> None:
    file = written(tmp_path / "x", {"t": {**F32, "shape": [1] * 65 + [2]}}, b"\0" * 8)
    with pytest.raises(TruncatedShard, match="'t'"):
        read_shard(file)


def test_a_git_lfs_pointer_is_recognised(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (tmp_path / "model.safetensors").write_bytes(pointer)
    with pytest.raises(TruncatedShard, match="git lfs pull"):
        open_checkpoint(tmp_path)


UNSAFE = [
    "../../x",
    "../x.safetensors",
    "/etc/passwd",
    "a/../../x",
    "a/..",
    "..",
    ".",
    "",
    "..\\x",
    "C:\\x",
    "C:x",
    "\0",
]


@pytest.mark.parametrize("place", UNSAFE)
def test_an_index_that_leaves_the_directory_is_refused(place: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    save_file({"evil": torch.ones(1)}, tmp_path / "x")
    halves(tmp_path / "model", evil=place)
    with pytest.raises(UnsafePath, match="outside the model's directory"):
        open_checkpoint(tmp_path / "model")


def test_a_shard_in_a_folder_below_is_read(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    sharded(tmp_path, {"deep/one.safetensors": {"a": torch.ones(1)}})
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]


def test_a_missing_shard_is_named_with_its_tensors(tmp_path: Path) -> None:
    halves(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(
        MissingShard, match=r"model-2\.safetensors is not in .* 2 tensors .*'b\.weight', 'c\.weight'"
    ):
        open_checkpoint(tmp_path)


def test_an_index_that_promises_too_much_is_refused(tmp_path: Path) -> None:
    halves(tmp_path, **{"ghost.weight": "model-1.safetensors"})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors .*'ghost\.weight'"):
        open_checkpoint(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    one, two = {"a": torch.ones(1), "c": torch.ones(1)}, {"a": torch.zeros(1), "b": torch.zeros(1)}
    sharded(tmp_path, {"model-1.safetensors": one, "model-2.safetensors": two})
    with pytest.raises(CheckpointError, match="'a' lies in both"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "index", [b"{", b"[]", b'{"weight_map": []}', b'{"weight_map": {}}', b'{"weight_map": {"a": 1}}']
)
def test_an_index_without_a_map_is_refused(index: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(CheckpointError, match=r"index\.json (cannot be read|has no `weight_map`)"):
        open_checkpoint(tmp_path)


def test_a_directory_without_safetensors_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="saved as safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds an adapter"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"a pickle.*save_pretrained"):
        open_checkpoint(tmp_path)


def test_sites_are_told_from_headers(tmp_path: Path) -> None:
    shapes = {
        "bert.embeddings.word_embeddings": (50, 8),
        "model.embed_tokens": (50, 8),
        "wte": (50, 8),
        "shared": (50, 8),
        "encoder.embedding_hidden_mapping_in": (16, 8),
        "embed_out": (50, 8),
        "query": (6, 8),
        "norm": (8,),
        "conv": (4, 3, 2, 2),
        "line": (4, 3, 5),
    }
    tensors = {f"{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}
    more = {"query.bias": torch.zeros(6), "packed.weight": torch.zeros(6, 8, dtype=torch.uint8)}
    save_file({**tensors, **more}, tmp_path / "model.safetensors")
    found = {site.name: site for site in sites(open_checkpoint(tmp_path))}
    kinds = {name: site.kind for name, site in found.items()}
    assert kinds == {
        **dict.fromkeys(list(shapes)[:4], Kind.EMBEDDING),
        **dict.fromkeys(list(shapes)[4:7], Kind.LINEAR),
        **dict.fromkeys(["norm", "packed"], Kind.OTHER),
        **dict.fromkeys(["conv", "line"], Kind.CONV),
    }
    assert found["wte"] == Site("wte", Kind.EMBEDDING, (50, 8), Layout.IN_OUT)
    assert found["query"] == Site("query", Kind.LINEAR, (6, 8), Layout.OUT_IN)


def test_a_directory_is_where_it_is(tmp_path: Path) -> None:
    assert locate(str(tmp_path)) == tmp_path


def test_what_is_not_here_is_never_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="`hf download nobody/no-such-model`"):
        locate("nobody/no-such-model")
    with pytest.raises(CheckpointError, match="not a directory"):
        locate("./no/such/place")


def test_a_hub_id_is_found_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    home = tmp_path / "models--somebody--tiny"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    (home / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (home / "snapshots" / ("0" * 40) / "config.json").write_text("{}")
    assert locate("somebody/tiny") == home / "snapshots" / ("0" * 40)
