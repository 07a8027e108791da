"""Prompts: virtual tokens as embeddings in front of the words, in every call of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftsurgery.live.anatomy import Body, Family, embedding_below, position_limit
from peftsurgery.live.swap import After, Hook
from peftsurgery.live.tokens import (
    Call,
    TokenGraft,
    arguments,
    check_cache,
    check_continuation,
    check_length,
    embedding_at,
    is_continued,
    leading,
    token_graft,
    widened,
)

Arguments = tuple[tuple[Any, ...], Call]


@dataclass(frozen=True, slots=True)
class Prompted:
    """Puts the prompt in front of the input of a module; on a cached step the prompt is in the cache already.

    As in PEFT, positions that the caller gave are dropped, for the prompt shifts them; token types of the
    prompt are 0, and a language model gets none; the outputs are n tokens longer than the input.

    Args:
        label: the adapter.
        embedding: the name of the word embeddings below the hooked module.
        limit: how many positions the module has.
        causal: whether it is a language model; PEFT gives those no token types.
        per_token: whether its labels are one per token.
    """

    label: str
    embedding: str
    limit: int | None = None
    causal: bool = False
    per_token: bool = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Call) -> Arguments | None:
        graft = token_graft(module, self.embedding, self.label)
        if not graft.active:
            return None
        call, count = arguments(module, args, kwargs), graft.method.num_virtual_tokens
        check_cache(call)
        if is_continued(call):
            check_continuation(call, count)
        call.pop("position_ids", None)
        if "attention_mask" in call:
            call["attention_mask"] = widened(call["attention_mask"], count, 1)
        if self.causal:
            call.pop("token_type_ids", None)
        if is_continued(call):
            return (), call
        return (), self._prompted(call, graft, embedding_at(module, self.embedding), count)

    def _prompted(self, call: Call, graft: TokenGraft, embed: nn.Module, count: int) -> Call:
        check_length(leading(call)[-1], count, self.limit)
        ids = call.pop("input_ids", None)
        words: Tensor = call["inputs_embeds"] if ids is None else embed(ids)
        prompt = graft.tokens()[:count].to(words.device, words.dtype)
        call["inputs_embeds"] = torch.cat([prompt.expand(*words.shape[:-2], -1, -1), words], dim=-2)
        if "token_type_ids" in call:
            call["token_type_ids"] = widened(call["token_type_ids"], count, 0)
        if self.per_token and "labels" in call:
            call["labels"] = widened(call["labels"], count, -100)
        return call


@dataclass(frozen=True, slots=True)
class Remembered:
    """Lets a decoder see the prompt in what its encoder gave: that is `count` longer than its mask then.

    Args:
        label: the adapter.
        count: how many virtual tokens it has.
    """

    label: str
    count: int

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Call) -> Arguments | None:
        call = arguments(module, args, kwargs)
        memory, mask = call.get("encoder_hidden_states"), call.get("encoder_attention_mask")
        if memory is None or mask is None or memory.shape[1] - mask.shape[-1] != self.count:
            return None
        return (), {**call, "encoder_attention_mask": widened(mask, self.count, 1)}


@dataclass(frozen=True, slots=True)
class Stripped(After):
    """Takes the prompt off what the layers of a classifying decoder give.

    Its head finds the last word of every row by the input ids, which know of no prompt. (PEFT hides the ids
    from it, and then takes the last position, padded or not.)

    Args:
        label: the adapter.
        embedding: the name of the word embeddings below the hooked module.
    """

    label: str
    embedding: str

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Call, output: Any) -> Any:
        graft = token_graft(module, self.embedding, self.label)
        if not graft.active or "inputs_embeds" not in kwargs:
            return None
        words = output[0][:, graft.method.num_virtual_tokens :]
        if isinstance(output, tuple):
            return (words, *output[1:])
        output["last_hidden_state"] = words
        return output


def hooks(model: nn.Module, place: Body, label: str, count: int) -> tuple[tuple[str, Hook], ...]:
    """The hooks of a prompt of `count` tokens, by the module that each goes to."""
    limit = position_limit(model.get_submodule(place.memory))
    if place.family is Family.ENCODER_DECODER:
        prompted = Prompted(label, embedding_below(model, place.memory), limit)
        return ((place.memory, prompted), (place.trunk, Remembered(label, count)))
    causal = place.family is Family.DECODER and bool(model.can_generate())  # type: ignore[operator]
    if place.pooled and place.trunk:
        below = embedding_below(model, place.trunk)
        return (
            (place.trunk, Prompted(label, below, limit, causal)),
            (place.trunk, Stripped(label, below)),
        )
    return (("", Prompted(label, place.embedding, limit, causal, place.per_token)),)
