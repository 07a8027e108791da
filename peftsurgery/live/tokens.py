"""Virtual tokens on a live model: the graft that carries them, and how a hook finds it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from peftsurgery.errors import InputTooLong, PlanError
from peftsurgery.live.grafts import Graft, Theta
from peftsurgery.method import TokenMethod
from peftsurgery.reading import AS_PEFT, Reading

Call = dict[str, Any]
"""The arguments of a call by name."""


class TokenGraft(Graft):
    """The word embeddings, wearing the parameters of virtual tokens; words are embedded as ever."""

    reading: Reading

    def __init__(self, base: nn.Module, label: str, theta: Theta, reading: Reading = AS_PEFT) -> None:
        super().__init__(base, label, theta)
        self.__dict__["reading"] = reading

    @property
    def theta(self) -> Theta:
        """The adapter's parameters."""
        theta = self._modules[self.label]
        assert isinstance(theta, Theta)
        return theta

    @property
    def method(self) -> TokenMethod:
        method = self.theta.method
        assert isinstance(method, TokenMethod)
        return method

    def tokens(self) -> Tensor:
        """The virtual tokens in the dtype of the word embeddings: what `TokenMethod.tokens` gives."""
        weight = self.root.weight
        assert isinstance(weight, Tensor)
        return self.method.tokens(self.theta.params(), training=self.theta.training).to(weight.dtype)

    def keys_and_values(self, head_dim: int, heads: int) -> Tensor:
        """A prefix as (2 · layers, heads, n, head_dim); even rows are keys, odd ones values."""
        flat = self.tokens()
        return flat.view(flat.shape[0], -1, heads, head_dim).permute(1, 2, 0, 3)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base(*args, **kwargs)


def embedding_at(module: nn.Module, path: str) -> nn.Module:
    """The word embeddings, grafts and all, by their name below `module`."""
    found: nn.Module = module
    for part in path.split("."):
        inside = found.root if isinstance(found, Graft) else found
        found = inside._modules.get(part) or nn.Module()
    return found


def carriers(model: nn.Module) -> list[TokenGraft]:
    """The grafts of the virtual tokens that work on the model."""
    return [module for module in model.modules() if isinstance(module, TokenGraft) and module.active]


def token_graft(module: nn.Module, path: str, label: str) -> TokenGraft:
    """The graft of one adapter at the word embeddings.

    Raises:
        PlanError: somebody replaced the word embeddings, graft and all.
    """
    found = embedding_at(module, path)
    while isinstance(found, Graft):
        if isinstance(found, TokenGraft) and found.label == label:
            return found
        found = found.base
    raise PlanError(
        f"The word embeddings of {type(module).__name__} were replaced while the adapter {label!r} was on "
        "them. Remove the adapter first, and put it back afterwards."
    )


def arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """The arguments of a call of `module`, by name; those that are None are left out."""
    named = {**dict(zip(_parameters(type(module).forward), args, strict=False)), **kwargs}
    return {name: value for name, value in named.items() if value is not None}


def leading(call: Call) -> tuple[int, ...]:
    """The shape of the input without its width: (batch, length), or (batch, choices, length)."""
    return tuple(call["input_ids"].shape if "input_ids" in call else call["inputs_embeds"].shape[:-1])


def is_continued(call: Call) -> bool:
    """Whether the call continues an earlier one, whose keys and values it brings."""
    past = call.get("past_key_values")
    return past is not None and past.get_seq_length() > 0


def widened(tensor: Tensor, count: int, value: float) -> Tensor:
    """`count` times `value` in front of every row.

    Raises:
        PlanError: a mask that says for every pair of words what is seen, whose meaning is not ours to extend.
    """
    if not isinstance(tensor, Tensor) or tensor.ndim == 4:
        raise PlanError(
            "A 4-dimensional attention mask cannot be extended by virtual tokens. "
            "Give the (batch, length) mask."
        )
    return in_front(tensor, count, value)


def in_front(tensor: Tensor, count: int, value: float = 0) -> Tensor:
    """`count` times `value` in front of every row, (…, count + length).

    Not by torch's `pad`: ONNX Runtime has no CUDA kernel for that of integers and of bfloat16.
    """
    front = tensor.new_full((*tensor.shape[:-1], count), value)
    return torch.cat([front, tensor], -1)


def check_cache(call: Call) -> None:
    """Raise PlanError for a cache of a fixed size, which was made without room for virtual tokens."""
    past = call.get("past_key_values")
    if past is not None and past.is_compileable:
        raise PlanError(
            "Virtual tokens need a cache that grows, and the call brings one of a fixed size. "
            "Leave out `cache_implementation='static'`."
        )


def check_continuation(call: Call, count: int) -> None:
    """Raise PlanError where a continued call does not bring the words that follow those in its cache.

    `generate` cuts what it takes for cached off its input by the length of the cache, virtual tokens and all:
    it would cut `count` too many.
    """
    past, new = call["past_key_values"].get_seq_length(), leading(call)[-1]
    total = _words(call, new)
    if total is not None and total + count != past + new:
        raise PlanError(
            f"The call brings {new} of {total} words, and the cache has {past - count} words and {count} "
            "virtual tokens. Pass only the words that are not in the cache yet, with the mask of all words."
        )


def _words(call: Call, new: int) -> int | None:
    """How many words there are, cached ones included, by mask or positions; None if neither says."""
    if torch.compiler.is_exporting():
        return None
    if "attention_mask" in call:
        return int(call["attention_mask"].shape[-1]) if call["attention_mask"].ndim == 2 else None
    if "position_ids" in call and new > 1:  # one word is a step of `generate`, not worth waiting for a device
        return int(call["position_ids"].max()) + 1
    return None


def check_length(length: int, count: int, limit: int | None) -> None:
    """Raise InputTooLong where virtual tokens and input do not fit the model's positions."""
    if limit is not None and length + count > limit:
        raise InputTooLong(
            f"The input has {length} tokens, the adapter adds {count}, and the model has {limit} positions. "
            f"Cut the input to {limit - count} tokens (`truncation=True, max_length={limit - count}`).",
            length=length,
            limit=limit - count,
        )


@cache
def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)[1:]
