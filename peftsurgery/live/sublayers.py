"""Where the sublayers of an architecture end: the table of `anatomy` that output methods need.

A layer adds a sublayer's input to its output; a post-norm layer then normalises the sum. The names of modules are those
of transformers. The names of places are AdapterHub's (adapters 1.3.0), so that a key in its files is
`<site>.adapters.<adapter>.<parameter>`; where it has no class for an architecture they are those that its plug-in
interface uses. They are not always modules.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from peftsurgery.errors import UnsupportedSite, listing
from peftsurgery.live.sites import walk
from peftsurgery.site import Kind, Site

ATTENTION, CROSS, FEED_FORWARD = "mh_adapter", "cross_adapter", "output_adapter"
"""AdapterHub's words for the places of a layer where an adapter can be."""

MH, XA, FF = "attention_adapters", "cross_attention_adapters", "output_adapters"
"""Where AdapterHub keeps the parameters, in layers that have no module of their own for the sum."""


@dataclass(frozen=True, slots=True)
class Sublayer:
    """One sublayer, in names below its layer.

    Args:
        role: AdapterHub's word for it.
        place: where AdapterHub keeps the parameters of an adapter there.
        output: the module whose output, or the first of it, is the sublayer's.
        entry: the module whose input is what the layer adds to that.
        norm: the norm that follows the sum; none in a pre-norm layer.
        core: a module that only a layer with this sublayer has; `output` by default.
    """

    role: str
    place: str
    output: str
    entry: str
    norm: str = ""
    core: str = ""


@dataclass(frozen=True, slots=True)
class Stack:
    """The layers of an architecture: how the name of their list ends, and the sublayers of each.

    `drops` says that a layer itself drops from every sublayer's output, with its attribute `dropout`.
    """

    layers: str
    sublayers: tuple[Sublayer, ...]
    drops: bool = False


def _pre_norm(
    attention: str, ahead: str, feed_forward: str, before: str, place: str = FF
) -> tuple[Sublayer, ...]:
    return Sublayer(ATTENTION, MH, attention, ahead), Sublayer(FEED_FORWARD, place, feed_forward, before)


def _t5(role: str, index: int, core: str) -> Sublayer:
    own = f"layer.{index}"
    return Sublayer(role, own, f"{own}.dropout", f"{own}.layer_norm", core=f"{own}.{core}")


def _attended(place: str, of: str, dropout: str = "dropout") -> Sublayer:
    """The attention of BERT and its kin: `of` is the module that drops and normalises."""
    return Sublayer(ATTENTION, place, f"{of}.{dropout}", "attention", f"{of}.LayerNorm")


def _fed(place: str) -> Sublayer:
    return Sublayer(FEED_FORWARD, place, "output.dropout", "intermediate", "output.LayerNorm")


_BERT = Stack("encoder.layer", (_attended("attention.output", "attention.output"), _fed("output")))
_MPNET = Stack("encoder.layer", (_attended(MH, "attention"), _fed(FF)))
_ALBERT = Stack(
    "albert_layers",
    (
        _attended(f"attention.{MH}", "attention", "output_dropout"),
        Sublayer(FEED_FORWARD, FF, "ffn_output", "ffn", "full_layer_layer_norm"),
    ),
)
_DISTILBERT = Stack(
    "transformer.layer",
    (
        Sublayer(ATTENTION, MH, "attention", "attention", "sa_layer_norm"),
        Sublayer(FEED_FORWARD, FF, "ffn", "ffn", "output_layer_norm"),
    ),
)
_BART = Stack(
    "layers",
    (
        Sublayer(ATTENTION, MH, "self_attn", "self_attn", "self_attn_layer_norm"),
        Sublayer(CROSS, XA, "encoder_attn", "encoder_attn", "encoder_attn_layer_norm"),
        Sublayer(FEED_FORWARD, FF, "fc2", "fc1", "final_layer_norm"),
    ),
    drops=True,
)
_T5 = Stack(
    "block",
    (
        _t5(ATTENTION, 0, "SelfAttention"),
        _t5(CROSS, 1, "EncDecAttention"),
        _t5(FEED_FORWARD, 1, "DenseReluDense"),
        _t5(FEED_FORWARD, 2, "DenseReluDense"),
    ),
)
_MBART = Stack(
    "layers",
    (
        Sublayer(ATTENTION, MH, "self_attn", "self_attn_layer_norm"),
        Sublayer(CROSS, XA, "encoder_attn", "encoder_attn_layer_norm"),
        Sublayer(FEED_FORWARD, FF, "fc2", "final_layer_norm"),
    ),
    drops=True,
)
_VIT = Stack(
    "layers",
    _pre_norm("attention", "layernorm_before", "mlp", "layernorm_after", place=f"output.{FF}"),
    drops=True,
)
_GEMMA = Stack(
    "layers",
    _pre_norm(
        "post_attention_layernorm",
        "input_layernorm",
        "post_feedforward_layernorm",
        "pre_feedforward_layernorm",
    ),
)
_LLAMA = Stack("layers", _pre_norm("self_attn", "input_layernorm", "mlp", "post_attention_layernorm"))
_CLIP = Stack("layers", _pre_norm("self_attn", "layer_norm1", "mlp", "layer_norm2"))

STACKS: Mapping[str, Stack] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta-v2"), _BERT),
    "distilbert": _DISTILBERT,
    "mpnet": _MPNET,
    "albert": _ALBERT,
    "modernbert": Stack("layers", _pre_norm("attn", "attn_norm", "mlp", "mlp_norm")),
    "gpt2": Stack("h", _pre_norm("attn", "ln_1", "mlp", "ln_2")),
    "opt": Stack(
        "layers", _pre_norm("self_attn", "self_attn_layer_norm", "fc2", "final_layer_norm"), drops=True
    ),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), _LLAMA),
    **dict.fromkeys(("t5", "mt5"), _T5),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA),
    **dict.fromkeys(("bart", "marian"), _BART),
    **dict.fromkeys(("mbart", "pegasus"), _MBART),
    **dict.fromkeys(("vit", "deit"), _VIT),
    **dict.fromkeys(("clip_text_model", "clip_vision_model", "siglip_vision_model"), _CLIP),
}
"""Model type → its layers."""


def stack_of(model: nn.Module) -> Stack:
    """The table's line for a model.

    Raises:
        UnsupportedSite: it has none.
    """
    config: Any = getattr(model, "config", None)
    kind = str(getattr(config, "model_type", ""))
    late = getattr(config, "do_layer_norm_before", True) is False
    if kind not in STACKS or late:
        variant = " with its norms behind the sums" if late else ""
        raise UnsupportedSite(
            f"Where the sublayers of {type(model).__name__}{variant} end is not known; it is for "
            f"{listing(tuple(STACKS), len(STACKS))}. Take LoRA for it; nothing was changed.",
            site="",
        )
    return STACKS[kind]


def sublayers(model: nn.Module) -> dict[str, tuple[str, Sublayer]]:
    """For the name of every output site, in the model's order: its layer's name, and the sublayer.

    Raises:
        UnsupportedSite: the architecture is not in the table.
    """
    stack = stack_of(model)
    end = re.compile(rf"(?:.*\.)?{re.escape(stack.layers)}\.[0-9]+")
    names = dict.fromkeys(name for name, _ in walk(model))
    layers = [name for name in names if end.fullmatch(name)]
    return {f"{layer}.{sub.place}": (layer, sub) for layer in layers for sub in present(stack, names, layer)}


def present(stack: Stack, names: Collection[str], layer: str) -> list[Sublayer]:
    """The sublayers that a layer has, in a model whose modules have these names."""
    return [sub for sub in stack.sublayers if f"{layer}.{sub.core or sub.output}" in names]


def output_sites(model: nn.Module) -> tuple[Site, ...]:
    """The outputs of every sublayer, each as wide as the model.

    Raises:
        UnsupportedSite: the architecture is not in the table.
    """
    found = sublayers(model)
    config: Any = model.config
    shape = (int(config.hidden_size),)
    return tuple(Site(name, Kind.OUTPUT, shape, role=sub.role) for name, (_, sub) in found.items())
