"""Prefixes: virtual tokens as keys and values in front of every layer's own.

Where an architecture keeps a cache of keys and values, the prefix is its first entries. A bidirectional
encoder has none: there each attention module wears a graft (`attention.py`), and the positions of the words
move by n, as they do in PEFT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftsurgery.errors import PlanError
from peftsurgery.live.anatomy import Body, Family, embedding_below, numbers_words, position_limit
from peftsurgery.live.prompts import Arguments
from peftsurgery.live.swap import Hook
from peftsurgery.live.tokens import (
    Call,
    TokenGraft,
    arguments,
    check_cache,
    check_continuation,
    check_length,
    is_continued,
    leading,
    token_graft,
    widened,
)
from peftsurgery.reading import Reading

SPENT = "_peftsurgery_spent"
"""Marks a cache that was made only to carry a prefix through one call without caching. Models give it back
all the same, and `generate` would bring it along with the whole input again."""


@dataclass(frozen=True, slots=True)
class Cached:
    """Starts every empty cache with the prefix, and lets the mask see it.

    Args:
        label: the adapter.
        embedding: the name of the word embeddings below the hooked module.
        heads, head_dim: the size of a layer's keys.
        crossed: whether the module is the decoder of an encoder-decoder.
        limit: how many positions it has.
    """

    label: str
    embedding: str
    heads: int
    head_dim: int
    crossed: bool
    limit: int | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Call) -> Arguments | None:
        graft = token_graft(module, self.embedding, self.label)
        if not graft.active:
            return None
        _check_checkpointing(module)
        call, count = arguments(module, args, kwargs), graft.method.num_virtual_tokens
        check_cache(call)
        continued = is_continued(call) and SPENT not in call["past_key_values"].__dict__
        if continued:
            check_continuation(call, count)
        if "attention_mask" in call:
            call["attention_mask"] = widened(call["attention_mask"], count, 1)
        if "position_ids" in call:
            call["position_ids"] = call["position_ids"] + count
        if not continued:
            check_length(leading(call)[-1], count, self.limit)
            call["past_key_values"] = self._filled(call, graft, module)
        return (), call

    def _filled(self, call: Call, graft: TokenGraft, module: nn.Module) -> Any:
        past, config = call.get("past_key_values"), cast(Any, module.config)
        if past is None or SPENT in past.__dict__:
            past = self._empty(config)
            past.__dict__.update(
                {} if call.get("use_cache", getattr(config, "use_cache", True)) else {SPENT: True}
            )
        own = past.self_attention_cache if self.crossed else past
        entries = graft.keys_and_values(self.head_dim, self.heads).unsqueeze(1)
        entries = entries.expand(-1, leading(call)[0], -1, -1, -1)
        for layer, (key, value) in enumerate(by_layer(entries, self.crossed)):
            own.update(key, value, layer)
        return past

    def _empty(self, config: Any) -> Any:
        from transformers import DynamicCache, EncoderDecoderCache

        own = DynamicCache(config=config)
        return EncoderDecoderCache(own, DynamicCache(config=config)) if self.crossed else own


def by_layer(entries: Tensor, crossed: bool) -> list[tuple[Tensor, Tensor]]:
    """The keys and values of every layer, of a prefix whose even entries are keys and odd ones values."""
    # PEFT cuts the prefix of an encoder-decoder as if every layer had four entries, and starts over when
    # they run out; what was trained with it means that.
    step, count = 4 if crossed else 2, len(entries)
    firsts = [step * layer % count for layer in range(count // 2)]
    return [(entries[first], entries[first + 1]) for first in firsts]


@dataclass(frozen=True, slots=True)
class Shifted:
    """Numbers the words of an encoder from n on, for the prefix has the first n positions.

    Args:
        label: the adapter.
        embedding: the name of the word embeddings below the hooked module.
        padding: for encoders that number only what is no padding: the padding token's id.
        limit: how many positions the encoder has.
    """

    label: str
    embedding: str
    padding: int | None = None
    limit: int | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Call) -> Arguments | None:
        graft = token_graft(module, self.embedding, self.label)
        if not graft.active:
            return None
        call, count = arguments(module, args, kwargs), graft.method.num_virtual_tokens
        check_length(leading(call)[-1], count, self.limit)
        call["position_ids"] = (
            call["position_ids"] + count if "position_ids" in call else self._numbers(call, count)
        )
        return (), call

    def _numbers(self, call: Call, count: int) -> Tensor:
        words: Tensor = call["input_ids"] if "input_ids" in call else call["inputs_embeds"]
        rows, length = words.shape[:2]
        if self.padding is not None and "input_ids" in call:
            kept = words.ne(self.padding).long()
            return (kept.cumsum(1) + count) * kept + self.padding
        first = count if self.padding is None else count + self.padding + 1
        return torch.arange(first, first + length, device=words.device).expand(rows, length)


def hooks(
    model: nn.Module, place: Body, label: str, shape: tuple[int, ...], reading: Reading
) -> tuple[tuple[str, Hook], ...]:
    """The hooks of a prefix, by the module that each goes to; `shape` is (kv_heads, head_dim).

    Raises:
        PlanError: the model cannot be read so.
    """
    _check(model, place, reading)
    limit, below = position_limit(model.get_submodule(place.trunk)), embedding_below(model, place.trunk)
    if place.family is Family.ENCODER:
        shifted = ((place.trunk, Shifted(label, below, place.padding, limit)),)
        return shifted if reading.position_shift else ()
    crossed = place.family is Family.ENCODER_DECODER
    return ((place.trunk, Cached(label, below, shape[0], shape[1], crossed, limit)),)


def _check(model: nn.Module, place: Body, reading: Reading) -> None:
    if reading.strip_virtual_outputs or reading.pool != "first":
        raise PlanError(
            "A prefix adds no tokens to the outputs and none to be pooled: strip_virtual_outputs and pool='cls' "
            "are for prompts. Leave them out; nothing was changed."
        )
    if not reading.position_shift and place.family is not Family.ENCODER:
        raise PlanError(
            f"position_shift=False is for encoders: {type(model).__name__} keeps its prefix in the cache, whose "
            "length says where words begin. Leave it out; nothing was changed."
        )
    if not reading.position_shift and not numbers_words(model, place.trunk):
        raise PlanError(
            f"position_shift=False changes nothing in {type(model).__name__}: its words have distances and no "
            "positions. Leave it out; nothing was changed."
        )


def _check_checkpointing(module: nn.Module) -> None:
    if module.training and getattr(module, "is_gradient_checkpointing", False):
        raise PlanError(
            "Gradient checkpointing throws the cache away that a prefix stands in. Train without it "
            "(`model.gradient_checkpointing_disable()`), or take prompt tuning."
        )
