"""The keys and values that texts begin with: a soft prompt for each row, or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from peftsurgery.errors import ExportError
from peftsurgery.graph import cache
from peftsurgery.graph.sampling import Array

Prefix = Mapping[str, Array]
"""Constant keys and values by name, `prefix.<layer>.key` and `.value`, each (key-value heads, n, head width)."""


def first_past(
    ports: Mapping[str, tuple[int, int]], rows: int, prefixes: Sequence[Prefix | None]
) -> tuple[dict[str, Array], Array]:
    """The past that texts begin with, and its mask, (rows, longest prefix): padded on the left.

    Args:
        ports: for each key and value that goes in, its heads and its head width.
        prefixes: one for each row; none for no row.

    Raises:
        ExportError: the graph has no cache, or a prefix is not one of its model.
    """
    if not ports:
        raise ExportError(
            "The graph has no past_key_values, so it cannot go on with a text. Export a model for text "
            "generation: `peftsurgery export-onnx MODEL --task text-generation -o OUT`."
        )
    given = [*prefixes] or [None] * rows
    lengths = [0 if prefix is None else _length(prefix, len(ports)) for prefix in given]
    seen = np.arange(max(lengths))[::-1] < np.array(lengths)[:, None]
    past = {}
    for name, (heads, width) in ports.items():
        past[name] = np.zeros((rows, heads, max(lengths), width), np.float32)
        for row, prefix in enumerate(given):
            if prefix is not None:
                past[name][row, :, max(lengths) - lengths[row] :] = _entry(prefix, name, heads, width)
    return past, seen.astype(np.int64)


def _length(prefix: Prefix, entries: int) -> int:
    if len(prefix) != entries:
        raise ExportError(
            f"The prefix has keys and values for {len(prefix) // 2} layers and the model has {entries // 2}. "
            "Take one that was written for this model (`peftsurgery export-onnx MODEL --adapter PROMPT --prefix file`)."
        )
    return int(next(iter(prefix.values())).shape[1])


def _entry(prefix: Prefix, name: str, heads: int, width: int) -> Array:
    key = name.replace(cache.PAST, cache.PREFIX)
    if key not in prefix or prefix[key].shape[::2] != (heads, width):
        found = prefix[key].shape if key in prefix else "missing"
        raise ExportError(
            f"{key!r} is {found} in the prefix and the model takes {heads} heads of width {width}. "
            "Take a prefix that was written for this model."
        )
    return prefix[key]
