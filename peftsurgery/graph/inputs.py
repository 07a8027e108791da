"""Inputs that a model really meets: texts of several shapes, padded, within its vocabulary; images as noise.

A decoder gets its texts padded on the left, as for generating, and with a past: the prompt of a fresh text, tokens
that follow one, and the one token of a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from peftsurgery.graph import cache
from peftsurgery.graph.signature import (
    BATCH,
    BEFORE,
    LENGTH,
    PIXELS,
    SOURCE,
    TARGET,
    WRITTEN,
    Port,
    Signature,
)

Array = npt.NDArray[Any]
SHAPES = ((1, 8), (3, 17), (2, 64))
"""Rows and columns of the generated batches."""


def generated(
    signature: Signature, shapes: Sequence[tuple[int, int]] = SHAPES, seed: int = 0
) -> Iterator[dict[str, Array]]:
    """Random batches: every row but the first is shorter than the batch and padded.

    For a decoder, each shape as a fresh text, and after a short past and one of its own length. Images have the one
    size that the model takes, so of a shape only the rows count.
    """
    random = np.random.default_rng(seed)
    for rows, columns in shapes:
        for past in (0, 4, columns) if _is_cached(signature) else (0,):
            yield batch(random, signature, rows, min(columns, _room(signature, columns, past)), past)


def batch(
    random: np.random.Generator, signature: Signature, rows: int, columns: int, past: int = 0
) -> dict[str, Array]:
    """One random batch; behind a `past` the rows go on with `columns` tokens."""
    if signature.sees:
        return {PIXELS: _image(random, signature.inputs[0], rows)}
    total = past + columns
    mask = _mask(signature, [max(1, total - total * row // rows) for row in range(rows)])
    new = mask[:, past:]
    made = {
        "input_ids": np.where(new, _tokens(random, signature, new.shape), signature.pad_id),
        "token_type_ids": new * random.integers(0, max(1, signature.type_vocab_size), new.shape),
        TARGET: _tokens(random, signature, (rows, columns // 2 + 1)),
    }
    for port in signature.inputs:
        if cache.is_cached([port.name]):
            heads, width = int(port.axes[1]), int(port.axes[3])
            made[port.name] = random.standard_normal((rows, heads, past, width))
    return _feed(signature, mask, made, past)


def of_tokens(signature: Signature, rows: Sequence[Sequence[int]]) -> dict[str, Array]:
    """Texts as one batch, padded; a decoder reads them as fresh ones, an encoder-decoder writes the first half.

    What is beyond the longest input is left off.
    """
    kept = [list(row)[: signature.longest or None] for row in rows]
    mask = _mask(signature, [len(row) for row in kept])
    ids: Array = np.full(mask.shape, signature.pad_id)
    ids[mask] = np.concatenate(kept)
    made = {"input_ids": ids, "token_type_ids": np.zeros_like(ids), TARGET: ids[:, : ids.shape[1] // 2 + 1]}
    for port in signature.inputs:
        if cache.is_cached([port.name]):
            made[port.name] = np.zeros((len(kept), int(port.axes[1]), 0, int(port.axes[3])))
    return _feed(signature, mask, made)


def tokens_of(feed: Mapping[str, Array]) -> list[list[int]]:
    """The texts of a batch without a past, each without its padding."""
    kept = zip(feed["input_ids"], feed["attention_mask"].astype(bool), strict=True)
    return [ids[mask].tolist() for ids, mask in kept]


def _mask(signature: Signature, lengths: Sequence[int]) -> Array:
    """True for the tokens of texts so long; a decoder's are padded on the left, others' on the right."""
    columns = np.arange(max(lengths))
    reached = columns[::-1] if _is_cached(signature) else columns
    mask: Array = reached < np.array(lengths)[:, None]
    return mask


def _feed(signature: Signature, mask: Array, made: Mapping[str, Array], past: int = 0) -> dict[str, Array]:
    """A batch in the signature's order, with the mask and positions that its tokens have."""
    positions = np.maximum(mask.cumsum(1) - 1, 0)[:, past:]
    feed = {**made, "attention_mask": mask, "position_ids": positions}
    return {port.name: _as(feed[port.name], port) for port in signature.inputs}


def as_torch(
    feed: Mapping[str, Array], signature: Signature, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """A batch as tensors of the dtypes that the model takes, in the signature's order."""
    return {p.name: torch.tensor(feed[p.name], device=device).to(p.torch_dtype) for p in signature.inputs}


def _is_cached(signature: Signature) -> bool:
    return cache.is_cached(port.name for port in signature.inputs)


def _room(signature: Signature, columns: int, past: int) -> int:
    return max(1, signature.longest - past) if signature.longest else columns


def _as(array: Array, port: Port) -> Array:
    # numpy has no bfloat16: whoever feeds such an input makes it of float32.
    return array.astype("float32" if port.dtype == "bfloat16" else port.dtype)


PAST = 5
"""How many tokens a traced decoder has seen."""
SIZES = {BATCH: 2, LENGTH: 11, SOURCE: 11, WRITTEN: 3, BEFORE: PAST}


def sample(signature: Signature) -> dict[str, Array]:
    """One batch to trace with: no axis is 0 or 1 long, and a row is padded, for a mask of ones is traced away."""
    random = np.random.default_rng(0)
    if any(BEFORE in port.axes for port in signature.inputs):
        return {port.name: _filled(random, signature, port) for port in signature.inputs}
    return batch(random, signature, SIZES[BATCH], SIZES[LENGTH], PAST if _is_cached(signature) else 0)


def _filled(random: np.random.Generator, signature: Signature, port: Port) -> Array:
    shape = tuple(long(axis, SIZES) for axis in port.axes)
    if port.name.endswith("mask"):
        return _as(np.arange(shape[1]) < shape[1] - 4 * np.arange(shape[0])[:, None], port)
    if port.name == "input_ids":
        return _tokens(random, signature, shape)
    return _as(random.standard_normal(shape), port)


def long(axis: int | str, sizes: Mapping[str, int]) -> int:
    """How long an axis is, by the sizes of those with names: `sequence_length + 20` is 20 more than that.

    Raises:
        KeyError: a name has no size.
    """
    words = [axis] if isinstance(axis, int) else axis.split(" + ")
    return sum(int(word) if str(word).isdigit() else sizes[str(word)] for word in words)


def _image(random: np.random.Generator, port: Port, rows: int) -> Array:
    """Pixels as a processor leaves them: about 0, with a spread of about 1."""
    size = [axis for axis in port.axes[1:] if isinstance(axis, int)]
    return _as(random.standard_normal((rows, *size)), port)


def _tokens(random: np.random.Generator, signature: Signature, shape: tuple[int, ...]) -> Array:
    """Token ids other than the padding's."""
    ids = random.integers(0, signature.vocab_size - 1, shape)
    return ids + (ids >= signature.pad_id)
