"""The safetensors checkpoint of a directory, told from its headers: a tensor is read when it is asked for."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath

from torch import Tensor

from peftsurgery.disk.identity import Stamp, stamp
from peftsurgery.disk.marker import check_whole
from peftsurgery.disk.shard import Shard, Stored, load, read_shard
from peftsurgery.errors import CheckpointError, MissingShard, UnsafePath, listing
from peftsurgery.site import Kind, Layout, Site

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
EMBEDDING = re.compile(
    r"(.*_)?embed(ding|dings|s)?(_tokens|_positions|_in)?|wte|wpe|shared|relative_attention_bias"
)
"""What modules are called that look a row up; a header does not say it."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of a model directory.

    Args:
        shards: its files, by name.
        index: the `metadata` of its index, where it has one.
    """

    path: Path
    shards: tuple[Shard, ...]
    index: Mapping[str, object] | None = None

    @property
    def indexed(self) -> bool:
        """Whether an index says which file holds what."""
        return self.index is not None

    @property
    def tensors(self) -> Mapping[str, Stored]:
        """Every tensor by its name, in the order of files and bytes."""
        return {stored.name: stored for shard in self.shards for stored in shard.tensors}

    @property
    def nbytes(self) -> int:
        """The size of all tensors."""
        return sum(stored.nbytes for shard in self.shards for stored in shard.tensors)


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a directory: `model.safetensors`, or else what `model.safetensors.index.json` names.

    Other files are ignored, however they are called; it is the order in which transformers looks.

    Raises:
        CheckpointError: there is none, or its index is not true.
        MissingShard: a file that the index names is not there.
        UnsafePath: a file that the index names lies outside the directory.
        TruncatedShard: a file is shorter, longer or stranger than its header says.
    """
    check_whole(path)
    if (path / SINGLE).is_file():
        return Checkpoint(path, (_shard(path / SINGLE),))
    if (path / INDEX).is_file():
        return _indexed(path)
    raise CheckpointError(f"{path} holds neither {SINGLE} nor {INDEX}. {_remedy(path)}")


def stream(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Every tensor with its name, one at a time, in the order of files and bytes."""
    for shard in checkpoint.shards:
        yield from ((stored.name, load(stored)) for stored in shard.tensors)


def sites(checkpoint: Checkpoint) -> list[Site]:
    """Every module with a `weight`, as far as headers tell: by dtype, number of axes and name.

    A header cannot tell transformers' Conv1D (in, out) from a linear map, nor a grouped convolution
    from a plain one; a skeleton of the model can.
    """
    stored = checkpoint.tensors.values()
    return [_site(tensor) for tensor in stored if tensor.name.endswith(".weight")]


def _site(stored: Stored) -> Site:
    name = stored.name.removesuffix(".weight")
    kind = _kind(name.rsplit(".", 1)[-1], stored)
    return Site(name, kind, stored.shape, Layout.IN_OUT if kind is Kind.EMBEDDING else Layout.OUT_IN)


def _kind(leaf: str, stored: Stored) -> Kind:
    if not stored.torch_dtype.is_floating_point or not 2 <= len(stored.shape) <= 5:
        return Kind.OTHER
    if len(stored.shape) > 2:
        return Kind.CONV
    return Kind.EMBEDDING if EMBEDDING.fullmatch(leaf) else Kind.LINEAR


def _indexed(path: Path) -> Checkpoint:
    named, metadata = _read_index(path / INDEX)
    for file in named:
        _check_inside(file)
    shards = tuple(_named_shard(path, file, names) for file, names in sorted(named.items()))
    _check_once(stored for shard in shards for stored in shard.tensors)
    return Checkpoint(path, shards, metadata)


def _check_once(tensors: Iterable[Stored]) -> None:
    holders: dict[str, Stored] = {}
    for stored in tensors:
        other = holders.setdefault(stored.name, stored)
        if other is not stored:
            raise CheckpointError(
                f"{stored.name!r} lies in both {other.file.name} and {stored.file.name}, so which one counts "
                "is not known. Save the model again; nothing was changed."
            )


def _read_index(file: Path) -> tuple[dict[str, list[str]], dict[str, object]]:
    """For each shard the tensors that it should hold; and the index's own metadata."""
    try:
        said = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read ({error!s:.80}). Download or save it again.") from error
    places = said.get("weight_map") if isinstance(said, dict) else None
    if (
        not isinstance(places, dict)
        or not places
        or not all(isinstance(place, str) for place in places.values())
    ):
        raise CheckpointError(f"{file} has no `weight_map` of tensors to files. Download or save it again.")
    named: dict[str, list[str]] = defaultdict(list)
    for name, place in places.items():
        named[place].append(name)
    metadata = said.get("metadata")
    return named, metadata if isinstance(metadata, dict) else {}


def _check_inside(file: str) -> None:
    """Refuse a name that leaves the directory; links inside it (a hub cache's) are the owner's business."""
    posix, windows = PurePosixPath(file), PureWindowsPath(file)
    parts = {*posix.parts, *windows.parts}
    if (
        not posix.parts
        or posix.is_absolute()
        or windows.anchor
        or ".." in parts
        or "\\" in file
        or "\0" in file
    ):
        raise UnsafePath(
            f"{INDEX} names the file {file!r}, which lies outside the model's directory. "
            "Do not trust this model; nothing was read from there."
        )


def _named_shard(path: Path, file: str, names: list[str]) -> Shard:
    if not (path / file).is_file():
        raise MissingShard(
            f"{file} is not in {path}, and {INDEX} puts {len(names)} tensors there: {listing(names)}. "
            "Download the model again; nothing was changed."
        )
    shard = _shard(path / file)
    lost = sorted(set(names) - {stored.name for stored in shard.tensors})
    if lost:
        raise CheckpointError(
            f"{path / file} lacks {len(lost)} tensors that {INDEX} promises: {listing(lost)}. "
            "Download or save the model again; nothing was changed."
        )
    return shard


def _shard(file: Path) -> Shard:
    """`read_shard`, asked once of a file that does not change: a fleet opens its base for every adapter."""
    return _asked(file, stamp(file))


@lru_cache(maxsize=1024)
def _asked(file: Path, stamp: Stamp) -> Shard:
    return read_shard(file)


def _remedy(path: Path) -> str:
    if any((path / name).is_file() for name in PICKLES):
        return (
            "Its weights are a pickle, which can run code. If you trust who made it, convert it once: load "
            "it with its own class of transformers and call `save_pretrained(OUT)`."
        )
    if (path / "adapter_config.json").is_file():
        return "It holds an adapter; give the model that the adapter was trained on."
    return "Give the directory of a model that was saved as safetensors."


__all__ = ["INDEX", "SINGLE", "Checkpoint", "Shard", "Stored", "load", "open_checkpoint", "sites", "stream"]
