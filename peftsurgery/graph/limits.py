"""What makes a model's input a fair one: how long it may be, and what a decoder begins with."""

from __future__ import annotations

from typing import Any

from torch import nn


def longest(positions: int | None, unused: int) -> int:
    """The longest input for so many positions, the first ones `unused`; 0 where there is no bound."""
    return max(0, (positions or 0) - unused)


def longest_of(model: nn.Module) -> int:
    """The longest input that a transformers model has positions for; 0 where there is no bound."""
    config: Any = model.config
    positions = getattr(config, "max_position_embeddings", None)
    # RoBERTa and its kin number their words from the padding's id on, which their table of positions names.
    tables = (
        module
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
    )
    padded = [table.padding_idx for table in tables if table.padding_idx is not None]
    return longest(positions, max(padded, default=-1) + 1)


def begins_with(model: nn.Module, pad: int) -> int:
    """What an encoder-decoder's decoder begins with, as transformers' `generate` has it; `pad` where it is not said."""
    said: Any = getattr(model, "generation_config", None)
    words = (getattr(said, word, None) for word in ("decoder_start_token_id", "bos_token_id"))
    return next((token for token in words if token is not None), pad)
