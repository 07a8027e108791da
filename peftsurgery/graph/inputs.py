"""Inputs that a model really meets: texts of several shapes, padded, within its vocabulary; images as noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from peftsurgery.graph.signature import PIXELS, Port, Signature

Array = npt.NDArray[Any]
SHAPES = ((1, 8), (3, 17), (2, 64))
"""Rows and columns of the generated batches."""


def generated(
    signature: Signature, shapes: Sequence[tuple[int, int]] = SHAPES, seed: int = 0
) -> Iterator[dict[str, Array]]:
    """Random batches: every row but the first is shorter than the batch and padded on the right.

    Images have the one size that the model takes, so of a shape only the rows count.
    """
    random = np.random.default_rng(seed)
    for rows, columns in shapes:
        if signature.inputs[0].name == PIXELS:
            yield {PIXELS: _image(random, signature.inputs[0], rows)}
            continue
        columns = min(columns, signature.longest or columns)
        lengths = np.array([max(1, columns - columns * row // rows) for row in range(rows)])
        mask = np.arange(columns) < lengths[:, None]
        feed = {
            "input_ids": np.where(mask, _tokens(random, signature, mask.shape), signature.pad_id),
            "attention_mask": mask,
            "token_type_ids": mask * random.integers(0, max(1, signature.type_vocab_size), mask.shape),
        }
        yield {port.name: feed[port.name].astype(port.dtype) for port in signature.inputs}


def _image(random: np.random.Generator, port: Port, rows: int) -> Array:
    """Pixels as a processor leaves them: about 0, with a spread of about 1."""
    size = [axis for axis in port.axes[1:] if isinstance(axis, int)]
    # numpy has no bfloat16; who feeds such a model rounds.
    return random.standard_normal((rows, *size)).astype(np.float16 if port.dtype == "float16" else np.float32)


def _tokens(random: np.random.Generator, signature: Signature, shape: tuple[int, ...]) -> Array:
    """Token ids other than the padding's."""
    ids = random.integers(0, signature.vocab_size - 1, shape)
    return ids + (ids >= signature.pad_id)
