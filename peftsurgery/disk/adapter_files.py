"""The files that adapter directories of every format are made of: JSON objects, tensors, pickles of tensors."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from peftsurgery.adapter import Adapter
from peftsurgery.disk.pieces import Piece
from peftsurgery.disk.shard import fetch, read_shard
from peftsurgery.disk.writer import ShardTask, write_shard
from peftsurgery.errors import AdapterError, TruncatedShard, UntrustedPickle
from peftsurgery.lazy import Kept, Lazy


def json_object(file: Path) -> Mapping[str, object]:
    """The JSON object in a file.

    Raises:
        AdapterError: it holds none.
    """
    try:
        raw = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{file} is no JSON ({error}). Save or download it again.") from None
    if not isinstance(raw, dict):
        raise AdapterError(f"{file} holds no JSON object. Save or download it again.")
    return raw


def tensors(path: Path, safe: str, pickled: str, allow_pickle: bool) -> Mapping[str, Tensor]:
    """The tensors of a directory, from its safetensors file or, where that was asked for, from its pickle.

    Args:
        safe, pickled: the names of the two files.

    Raises:
        UntrustedPickle: only the pickle is there, and it was not asked for.
        TruncatedShard: the file is shorter, or stranger, than its header says.
        AdapterError: neither is there.
    """
    if (path / safe).exists():
        return safetensors(path / safe)
    if not (path / pickled).exists():
        raise AdapterError(f"{path} holds a configuration but no {safe}. Save or download the adapter again.")
    if allow_pickle:
        return _unpickled(path / pickled)
    raise UntrustedPickle(
        f"{path} holds its tensors as a pickle ({pickled}), which can carry code. If you trust who made it, "
        "read it with `--allow-pickle` (`allow_pickle=True`), or have it saved as safetensors."
    )


def safetensors(file: Path) -> Lazy:
    """The tensors in a file, each read when it is asked for."""
    return Lazy({s.name: Kept(s.shape, s.torch_dtype, partial(fetch, s)) for s in read_shard(file).tensors})


def put(file: Path, tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Write a new safetensors file."""
    pieces = tuple(Piece(key, tensor.dtype, tensor) for key, tensor in tensors)
    write_shard(ShardTask(file, pieces, {"format": "pt"}))


def check_values(adapter: Adapter) -> None:
    """Raise an AdapterError for an adapter whose tensors have no values."""
    if any(tensor.is_meta for _, tensor in adapter.tensors()):
        raise AdapterError(
            f"Adapter {adapter.name!r} is on the meta device and has no values. Load or train it first."
        )


def _unpickled(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UntrustedPickle(
            f"{path} is no pickle of tensors alone. Have it saved as safetensors."
        ) from None
    except (RuntimeError, EOFError) as error:
        raise TruncatedShard(f"{path} is no whole file ({error!s:.80}). Download it again.") from None
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise AdapterError(f"{path} holds no mapping of names to tensors. Save the adapter again.")
    return found
