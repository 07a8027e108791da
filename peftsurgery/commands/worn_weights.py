"""What adapters bring that stay adapters in a graph, read where it lies: in the adapters' own files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from peftsurgery.commands.adapter_files import Given
from peftsurgery.commands.stored_weights import Base
from peftsurgery.disk.shard import Stored, load, read_shard
from peftsurgery.live.active import canonical_name
from peftsurgery.live.hollow import emptied


def worn(base: Base, live: nn.Module, given: Iterable[Given]) -> Base:
    """The base, as far as its model that wears the adapters can be read in files: theirs too.

    A parameter is known in a file by its values, whatever the format calls it. One that was found gives its bytes
    up, like the base's; one that was not, for instance of another dtype than its file's, keeps them.

    Args:
        live: the base's model with the adapters on it.

    Raises:
        CheckpointError: a file of an adapter cannot be read.
    """
    others = {file: f"{one.adapter.name}/{name}" for one in given for name, file in one.files.items()}
    own = {name: p for name, p in live.named_parameters() if not isinstance(p, FakeTensor)}
    found = _found(own, others)
    emptied(live, [own[name] for name in found])
    held = {canonical_name(live, name): stored for name, stored in found.items()}
    return replace(base, held={**base.held, **held}, others={**base.others, **others})


def _found(parameters: dict[str, nn.Parameter], files: Iterable[Path]) -> dict[str, Stored]:
    """For each parameter's name where a file holds it, of those that one does."""
    stored = {_mark(load(one)): one for file in files for one in read_shard(file).tensors}
    marks = {name: _mark(parameter) for name, parameter in parameters.items()} if stored else {}
    return {name: stored[mark] for name, mark in marks.items() if mark in stored}


def _mark(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    """What a tensor is known by: its dtype, its shape and every bit of it."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return tensor.dtype, tuple(tensor.shape), sha256(data).digest()
