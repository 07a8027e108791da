"""Prompts: virtual tokens as embeddings in front of the words, in every call of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftsurgery.errors import PlanError
from peftsurgery.live.anatomy import PER_ROW, Body, Family, embedding_below, pooling_stack, position_limit
from peftsurgery.live.grafts import Graft
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
from peftsurgery.reading import Reading

PER_TOKEN = ("last_hidden_state", "logits", "start_logits", "end_logits")
"""The outputs of transformers' models that may have one value for every token."""

ANSWERS = ("start_positions", "end_positions")
"""Labels that number a token of the output: where that is stripped, of the words."""

Arguments = tuple[tuple[Any, ...], Call]


@dataclass(frozen=True, slots=True)
class Prompted:
    """Puts the prompt in front of the input of a module; on a cached step the prompt is in the cache already.

    As in PEFT, positions that the caller gave are dropped, for the prompt shifts them; token types of the
    prompt are 0, and a language model gets none; the outputs are n tokens longer than the input. Where
    they are stripped, labels that number tokens count the words alone.

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
        if graft.reading.strip_virtual_outputs:
            call.update({name: call[name] + count for name in ANSWERS if name in call})
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
    """Takes the prompt off every output that has a value for each token.

    For the layers of a decoder that classifies this is always done: its head finds the last word of every row by
    the input ids, which know of no prompt. (PEFT hides the ids from it, and then takes the last position, padded
    or not.) Elsewhere it is `Reading.strip_virtual_outputs`.

    Args:
        label: the adapter.
        embedding: the name of the word embeddings below the hooked module.
    """

    label: str
    embedding: str

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Call, output: Any) -> Any:
        graft = token_graft(module, self.embedding, self.label)
        embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        is_first = embeds is not None and (mask is None or mask.shape[-1] == embeds.shape[-2])
        if not graft.active or embeds is None or not is_first:
            return None  # on a cached step the prompt is in the cache
        return stripped(output, graft.method.num_virtual_tokens, embeds.shape[-2])


class Unpooled(Graft):
    """The layers of an encoder, whose output leaves without the prompt: a pooler then reads the first word."""

    def __init__(self, base: nn.Module, label: str, count: int) -> None:
        super().__init__(base, label, Count(count))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output, own = self.base(*args, **kwargs), self.own
        assert isinstance(own, Count)
        return stripped(output, own.count) if self.active else output


class Count(nn.Module):
    """How many virtual tokens leave; no parameter."""

    count: int

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def extra_repr(self) -> str:
        return f"{self.count} virtual tokens"


def stripped(output: Any, count: int, length: int | None = None) -> Any:
    """A model's output without the first `count` of its values for each of `length` tokens."""
    if isinstance(output, tuple):
        return (*(_cut(value, count, length) for value in output[:2]), *output[2:])
    for name in PER_TOKEN:
        if output.get(name) is not None:
            output[name] = _cut(output[name], count, length)
    return output


def _cut(value: Any, count: int, length: int | None) -> Any:
    # Pooled outputs are not per token, and `generate` asks for the last logits only.
    if not isinstance(value, Tensor) or value.ndim < 2:
        return value
    is_long = value.ndim == 3 if length is None else value.shape[1] == length
    return value[:, count:] if is_long else value


def hooks(
    model: nn.Module, place: Body, label: str, count: int, reading: Reading
) -> tuple[tuple[str, Hook], ...]:
    """The hooks of a prompt of `count` tokens, by the module that each goes to.

    Raises:
        PlanError: the model cannot be read so.
    """
    _check(model, place, reading)
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
    own = ("", Prompted(label, place.embedding, limit, causal, place.per_token))
    strips = reading.strip_virtual_outputs and reading.pool == "first"
    return (own, ("", Stripped(label, place.embedding))) if strips else (own,)


def grafts(
    model: nn.Module, bases: Mapping[str, nn.Module], label: str, count: int, reading: Reading
) -> dict[str, Graft]:
    """What stands over the layers so that the first word is pooled; nothing where the prompt's is."""
    if reading.pool == "first":
        return {}
    stack = pooling_stack(model)
    assert stack is not None  # `hooks` has checked it
    return {stack: Unpooled(bases[stack], label, count)}


def _check(model: nn.Module, place: Body, reading: Reading) -> None:
    name = type(model).__name__
    if not reading.position_shift:
        raise PlanError(
            "position_shift=False is for prefixes on encoders: a prompt's tokens are words of the input, and "
            "have positions as words do. Leave it out; nothing was changed."
        )
    if reading.pool == "cls" and (place.family is not Family.ENCODER or pooling_stack(model) is None):
        raise PlanError(
            f"pool='cls' is for encoders that pool their first token, and {name} does not. "
            "Leave it out; nothing was changed."
        )
    one = place.family is Family.ENCODER_DECODER or place.pooled or name.endswith(PER_ROW)
    if reading.strip_virtual_outputs and one and reading.pool == "first":
        raise PlanError(
            f"strip_virtual_outputs has nothing to strip from {name}: no output of it has the prompt's tokens. "
            "Leave it out (`pool='cls'` lets a classifier read the first word); nothing was changed."
        )
