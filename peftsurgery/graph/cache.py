"""Keys and values of tokens that a decoder has seen, as plain tensors under optimum's names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftsurgery.errors import UnsupportedModel

PAST, PRESENT, PREFIX = "past_key_values", "present", "prefix"
PARTS = ("key", "value")


class Constant(nn.Module):
    """The keys and values that one layer of a decoder reads first, each (heads, n, head width)."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        super().__init__()
        self.key, self.value = nn.Buffer(key), nn.Buffer(value)


def name(kind: str, layer: int, part: str) -> str:
    """`past_key_values.0.key`, `present.3.value`."""
    return f"{kind}.{layer}.{part}"


def past_of(word: str) -> str:
    """The input that an output of keys or values is for; any other word as it is."""
    return f"{PAST}{word.removeprefix(PRESENT)}" if word.startswith(f"{PRESENT}.") else word


def is_cached(names: Iterable[str]) -> bool:
    """Whether keys and values are among the inputs of these names."""
    return any(word.startswith(f"{PAST}.") for word in names)


def of(feeds: Mapping[str, Tensor]) -> Any:
    """transformers' cache of the keys and values in `feeds`, each (batch, key-value heads, past, head width).

    It keeps every token. A model with a sliding window masks what lies outside of it.
    """
    from transformers import DynamicCache

    layers = sum(word.startswith(f"{PAST}.") for word in feeds) // len(PARTS)
    return DynamicCache([(feeds[name(PAST, i, "key")], feeds[name(PAST, i, "value")]) for i in range(layers)])


def named(cache: Any, kind: str = PRESENT) -> dict[str, Tensor]:
    """The keys and values of transformers' cache by name.

    Raises:
        UnsupportedModel: the model remembers something else (a state, compressed keys).
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    layers: list[Any] = list(cache.layers) if isinstance(cache, DynamicCache) else []
    if not layers or any(not isinstance(layer, DynamicLayer) or layer.keys is None for layer in layers):
        raise UnsupportedModel(
            f"The model keeps a {type(cache).__name__} that is not keys and values of each layer alone. "
            "Decoders with plain attention in every layer can be exported."
        )
    pairs = ((layer.keys, layer.values) for layer in layers)
    return {
        name(kind, i, part): tensor
        for i, pair in enumerate(pairs)
        for part, tensor in zip(PARTS, pair, strict=True)
    }


def behind(prefix: Mapping[str, Tensor], feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The feeds of a model that reads a constant `prefix` first; the caller's speak of the caller's own tokens.

    Args:
        prefix: `prefix.<layer>.key` and `.value`, each (key-value heads, n, head width).
    """
    if not prefix:
        return dict(feeds)
    count, rows = count_of(prefix), feeds["input_ids"].shape[0]
    wide = dict(feeds)
    wide["attention_mask"] = torch.cat(
        [feeds["attention_mask"].new_ones(rows, count), feeds["attention_mask"]], 1
    )
    if "position_ids" in feeds:
        wide["position_ids"] = feeds["position_ids"] + count
    for key, constant in prefix.items():
        past = key.replace(PREFIX, PAST)
        wide[past] = joined(constant.to(feeds[past]), feeds[past])
    return wide


def joined(constant: Tensor, past: Tensor) -> Tensor:
    """A constant, (heads, n, head width), in front of every row of keys or values."""
    return torch.cat([constant.expand(past.shape[0], -1, -1, -1), past], 2)


def beyond(prefix: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """The outputs of such a model without what the prefix takes in its cache."""
    if not prefix:
        return dict(given)
    count = count_of(prefix)
    return {n: t[:, :, count:] if n.startswith(f"{PRESENT}.") else t for n, t in given.items()}


def count_of(prefix: Mapping[str, Any]) -> int:
    """How many virtual tokens a prefix has."""
    return int(next(iter(prefix.values())).shape[1]) if prefix else 0
