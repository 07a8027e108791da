"""Attention surgery: a prefix in an encoder's attention, whose code knows nothing of one.

The module runs as a shallow copy of itself, made for the call, that differs in one thing: where it hands keys
and values to transformers' attention function, or takes them from its projections, the prefix is in front.
The base is never touched, and other grafts on the projections work as ever.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from peftsurgery.errors import PlanError
from peftsurgery.live.grafts import Graft
from peftsurgery.live.tokens import TokenGraft, in_front

INTERFACE = "peftsurgery_prefix"
"""The name of our attention function in transformers' table of them."""


class Seat(nn.Module):
    """What a prefix puts at one layer: no parameter; those lie at the word embeddings."""

    layer: int

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer

    def extra_repr(self) -> str:
        return f"layer {self.layer} of the prefix"


class PrefixGraft(Graft):
    """An attention module of an encoder with a prefix in front of its keys and values."""

    source: tuple[TokenGraft]
    heads: tuple[int, int]

    def __init__(
        self, base: nn.Module, label: str, layer: int, source: TokenGraft, heads: tuple[int, int]
    ) -> None:
        super().__init__(base, label, Seat(layer))
        # In a tuple the source is no child of this module, and still copied and pickled with the model.
        self.__dict__.update(source=(source,), heads=heads)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return self.base(*args, **kwargs)
        seat, (heads, head_dim) = self.own, self.heads
        assert isinstance(seat, Seat)
        entries = self.source[0].keys_and_values(head_dim, heads)
        key, value = entries[2 * seat.layer], entries[2 * seat.layer + 1]
        operate: Callable[..., Any] = SURGERIES.get(type(self.root).__name__, _by_interface)
        return operate(self.root, key, value, args, kwargs)


def _by_interface(root: Any, key: Tensor, value: Tensor, args: tuple[Any, ...], kwargs: Any) -> Any:
    """For modules that call `ALL_ATTENTION_FUNCTIONS`: one function more, which puts the prefix in front."""
    from transformers import AttentionInterface

    AttentionInterface.register(INTERFACE, _prefixed)
    twin = copy.copy(root)
    twin.__dict__.update(config=_Config(root.config), prefix=(key, value))
    return twin(*args, **kwargs)


class _Config:
    """A config that says another attention function."""

    _attn_implementation = INTERFACE

    def __init__(self, wanted: Any) -> None:
        self.wanted = wanted

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wanted, name)


def _prefixed(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    wanted = module.config.wanted._attn_implementation
    if wanted not in ("eager", "sdpa"):
        raise PlanError(
            f"A prefix in an encoder works with eager and sdpa attention, and the model uses {wanted!r}. "
            "Call `model.set_attn_implementation('sdpa')`."
        )
    key, value = _in_front(module.prefix, (key, value))
    code = sys.modules[type(module).__module__].__dict__
    attend = code["ALL_ATTENTION_FUNCTIONS"].get_interface(wanted, code["eager_attention_forward"])
    return attend(module, query, key, value, _seen(attention_mask, module.prefix[0].shape[1]), **kwargs)


def _mpnet(root: Any, key: Tensor, value: Tensor, args: tuple[Any, ...], kwargs: Any) -> Any:
    """MPNet computes softmax(q·k / √d + bias + mask)·v itself; the prefix has no position bias."""
    hidden, mask, bias = args
    shape, count = (*hidden.shape[:-1], -1, root.attention_head_size), key.shape[1]
    query, *own = (project(hidden).view(shape).transpose(1, 2) for project in (root.q, root.k, root.v))
    keys, values = _in_front((key, value), own)
    scores = query @ keys.transpose(-1, -2) / root.attention_head_size**0.5 + in_front(bias, count)
    seen = _seen(mask, count)
    weights = root.dropout((scores if seen is None else scores + seen).softmax(-1))
    output = root.o((weights @ values).transpose(1, 2).flatten(2))
    return (output, weights) if kwargs.get("output_attentions") else (output,)


def _deberta(root: Any, key: Tensor, value: Tensor, args: tuple[Any, ...], kwargs: Any) -> Any:
    """DeBERTa's disentangled bias is that of the words alone: the prefix is at no distance to anything."""
    hidden, mask, *rest = args
    count = key.shape[1]

    def disentangled_attention_bias(query: Tensor, keys: Tensor, *others: Any) -> Tensor:
        return in_front(root.disentangled_attention_bias(query, keys[:, count:], *others), count)

    twin = _projecting(root, {"key_proj": key, "value_proj": value})
    twin.__dict__["disentangled_attention_bias"] = disentangled_attention_bias
    return twin(hidden, in_front(mask, count, 1), *rest, **kwargs)


SURGERIES: dict[str, Callable[..., Any]] = {
    "MPNetSelfAttention": _mpnet,
    "DisentangledSelfAttention": _deberta,
}
"""The modules that do not call transformers' attention functions, by class."""


class _Front(nn.Module):
    """A projection that gives the prefix first."""

    prefix: Tensor

    def __init__(self, projection: nn.Module, prefix: Tensor) -> None:
        super().__init__()
        self.projection = projection
        self.__dict__["prefix"] = prefix

    def forward(self, x: Tensor) -> Tensor:
        own = self.projection(x)
        rows = self.prefix.transpose(0, 1).flatten(1).to(own.device, own.dtype)
        return torch.cat([rows.expand(own.shape[0], -1, -1), own], dim=1)


def _projecting(root: nn.Module, prefixes: dict[str, Tensor]) -> nn.Module:
    twin = copy.copy(root)
    fronts = {name: _Front(root.get_submodule(name), prefix) for name, prefix in prefixes.items()}
    twin.__dict__["_modules"] = {**root._modules, **fronts}
    return twin


def _in_front(prefix: Iterable[Tensor], own: Iterable[Tensor]) -> list[Tensor]:
    """Keys and values, (batch, heads, length, head_dim), with those of the prefix in front of every row's."""
    return [
        torch.cat([new.to(old.device, old.dtype).expand(old.shape[0], -1, -1, -1), old], dim=2)
        for new, old in zip(prefix, own, strict=True)
    ]


def _seen(mask: Tensor | None, count: int) -> Tensor | None:
    """The mask with `count` columns in front that everybody sees."""
    if mask is None:
        return None
    return in_front(mask, count, 1 if mask.dtype is torch.bool else 0)
