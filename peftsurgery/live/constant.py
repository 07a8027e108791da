"""Virtual tokens of a decoder as what they are to it: keys and values that no word changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peftsurgery.live.grafts import Graft
from peftsurgery.live.tokens import carriers


def keys_and_values(model: nn.Module) -> dict[str, Tensor]:
    """What the active virtual tokens leave in the cache, by layer; nothing where there are none.

    In a decoder no token sees those after it, so one word behind them is enough to have them computed: a prompt by
    the model itself, a prefix by its adapter.

    Returns:
        `prefix.<layer>.key` and `.value`, each (key-value heads, n, head width).
    """
    if not carriers(model):
        return {}
    device = next(model.parameters()).device
    word = torch.ones((1, 1), dtype=torch.int64, device=device)
    call: Any = model
    with torch.no_grad():
        cache = call(input_ids=word, attention_mask=word, use_cache=True, return_dict=True).past_key_values
    return {
        f"prefix.{i}.{part}": tensor[0, :, :-1].clone()
        for i, layer in enumerate(cache.layers)
        for part, tensor in (("key", layer.keys), ("value", layer.values))
    }


@contextmanager
def silenced(model: nn.Module) -> Iterator[nn.Module]:
    """The model as it reads without its virtual tokens; they work again afterwards."""
    labels = {carrier.label for carrier in carriers(model)}
    worn = [m for m in model.modules() if isinstance(m, Graft) and m.label in labels and m.active]
    for graft in worn:
        graft.active = False
    try:
        yield model
    finally:
        for graft in worn:
            graft.active = True
