"""The layers of every architecture: the table of `anatomy` that output methods need.

A layer adds a sublayer's input to its output; a post-norm layer then normalises the sum. A parallel layer adds both
sublayers at once, `x + attention + feed_forward`. The names of modules are those of transformers. The names of places
are AdapterHub's (adapters 1.3.0), so that a key in its files is `<site>.adapters.<adapter>.<parameter>`; where it has
no class for an architecture they are those that its plug-in interface uses. They are not always modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from peftsurgery.errors import UnsupportedSite

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
        output: the module whose output, or the first of it, is the sublayer's: what the layer adds. Of one that
            serves several sublayers, the call that follows `entry`'s.
        entry: the module whose input is what the layer adds to that.
        norm: the norm that follows the sum; none in a pre-norm layer.
        core: a module that only a layer with this sublayer has; `output` by default.
        dropout: where the layer drops from the output behind that module: an attribute, a module or a probability.
        beside: in a parallel layer, the module whose output stands in front of this one's in the same sum.
    """

    role: str
    place: str
    output: str
    entry: str
    norm: str = ""
    core: str = ""
    dropout: str = ""
    beside: str = ""


@dataclass(frozen=True, slots=True)
class Stack:
    """The layers of an architecture: how the name of their list ends, and the sublayers of each.

    Where layers differ in width, `ruler` is a norm of the layer, whose weight is as long as it is wide.
    """

    layers: str
    sublayers: tuple[Sublayer, ...]
    ruler: str = ""


def _pre_norm(
    attention: str, ahead: str, feed_forward: str, before: str, place: str = FF, dropout: str = ""
) -> tuple[Sublayer, ...]:
    return (
        Sublayer(ATTENTION, MH, attention, ahead, dropout=dropout),
        Sublayer(FEED_FORWARD, place, feed_forward, before, dropout=dropout),
    )


def _parallel(attention: str, feed_forward: str, ahead: str, dropout: str = "") -> tuple[Sublayer, ...]:
    """The two sublayers of `x + attention + feed_forward`; x enters the module `ahead`."""
    return (
        Sublayer(ATTENTION, MH, attention, ahead, dropout=dropout),
        Sublayer(FEED_FORWARD, FF, feed_forward, ahead, dropout=dropout, beside=attention),
    )


def _t5(role: str, index: int, core: str) -> Sublayer:
    own = f"layer.{index}"
    return Sublayer(role, own, f"{own}.dropout", f"{own}.layer_norm", core=f"{own}.{core}")


def _attended(place: str, of: str, dropout: str = "dropout", entry: str = "attention") -> Sublayer:
    """The attention of BERT and its kin: `of` is the module that drops and normalises."""
    return Sublayer(ATTENTION, place, f"{of}.{dropout}", entry, f"{of}.LayerNorm")


def _fed(place: str) -> Sublayer:
    return Sublayer(FEED_FORWARD, place, "output.dropout", "intermediate", "output.LayerNorm")


_BERT = Stack(
    "encoder.layer",
    (
        _attended("attention.output", "attention.output"),
        # AdapterHub's `cross_adapter` means nothing in a BERT: its `mh_adapter` is behind both attentions
        _attended("crossattention.output", "crossattention.output", entry="crossattention"),
        _fed("output"),
    ),
)
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
        Sublayer(ATTENTION, MH, "self_attn", "self_attn", "self_attn_layer_norm", dropout="dropout"),
        Sublayer(CROSS, XA, "encoder_attn", "encoder_attn", "encoder_attn_layer_norm", dropout="dropout"),
        Sublayer(FEED_FORWARD, FF, "fc2", "fc1", "final_layer_norm", dropout="dropout"),
    ),
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
        Sublayer(ATTENTION, MH, "self_attn", "self_attn_layer_norm", dropout="dropout"),
        Sublayer(CROSS, XA, "encoder_attn", "encoder_attn_layer_norm", dropout="dropout"),
        Sublayer(FEED_FORWARD, FF, "fc2", "final_layer_norm", dropout="dropout"),
    ),
)
_VIT = Stack(
    "layers",
    _pre_norm("attention", "layernorm_before", "mlp", "layernorm_after", f"output.{FF}", "dropout"),
)
# what BEiT, DINOv2 and Swin add comes out of one `drop_path`, behind the layer's scale
_BEIT = Stack("layers", _pre_norm("drop_path", "layernorm_before", "drop_path", "layernorm_after"))
_DINO = Stack("encoder.layer", _pre_norm("drop_path", "norm1", "drop_path", "norm2"))
_SWIN = Stack(
    "blocks",
    _pre_norm("drop_path", "layernorm_before", "dropout", "layernorm_after"),
    ruler="layernorm_before",
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


def _opt(config: Any) -> Stack:
    """OPT-350m normalises behind the sums, as BART does."""
    return _MBART if config.do_layer_norm_before else _BART


def _bloom(config: Any) -> Stack:
    """The residual goes through the sublayers' own modules; it is their input where it is taken behind the norms."""
    if config.pretraining_tp > 1 and config.slow_but_exact:
        raise UnsupportedSite(
            "This BLOOM multiplies with slices of its weights (`slow_but_exact`), so no module gives a sublayer's "
            "output. Make the model with `slow_but_exact=False`; nothing was changed.",
            site="",
        )
    late = config.apply_residual_connection_post_layernorm
    ahead, before = ("self_attention", "mlp") if late else ("input_layernorm", "post_attention_layernorm")
    attention, feed_forward, drop = "self_attention.dense", "mlp.dense_4h_to_h", "hidden_dropout"
    return Stack(
        "h",
        (
            Sublayer(ATTENTION, MH, attention, ahead, dropout=f"self_attention.{drop}"),
            Sublayer(FEED_FORWARD, FF, feed_forward, before, dropout=f"mlp.{drop}"),
        ),
    )


def _gpt_neox(config: Any) -> Stack:
    attention, feed_forward, ahead = "post_attention_dropout", "post_mlp_dropout", "input_layernorm"
    if config.use_parallel_residual:
        return Stack("layers", _parallel(attention, feed_forward, ahead))
    return Stack("layers", _pre_norm(attention, ahead, feed_forward, "post_attention_layernorm"))


def _falcon(config: Any) -> Stack:
    """A layer drops from the sum of its sublayers, by its configuration: adapters are in front of that."""
    attention, feed_forward, ahead = "self_attention", "mlp", "input_layernorm"
    if not (config.parallel_attn or config.new_decoder_architecture):
        return Stack("h", _pre_norm(attention, ahead, feed_forward, "post_attention_layernorm"))
    own = config.new_decoder_architecture and config.num_ln_in_parallel_attn == 2
    return Stack("h", _parallel(attention, feed_forward, "ln_attn" if own else ahead))


STACKS: Mapping[str, Stack | Callable[[Any], Stack]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta-v2"), _BERT),
    "distilbert": _DISTILBERT,
    "mpnet": _MPNET,
    "albert": _ALBERT,
    "modernbert": Stack("layers", _pre_norm("attn", "attn_norm", "mlp", "mlp_norm")),
    "gpt2": Stack("h", _pre_norm("attn", "ln_1", "mlp", "ln_2")),
    "opt": _opt,
    "bloom": _bloom,
    "gpt_neox": _gpt_neox,
    "falcon": _falcon,
    "gptj": Stack("h", _parallel("attn", "mlp", "ln_1")),
    "phi": Stack("layers", _parallel("self_attn", "mlp", "input_layernorm", "resid_dropout")),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), _LLAMA),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe"), _LLAMA),
    **dict.fromkeys(("t5", "mt5"), _T5),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA),
    **dict.fromkeys(("bart", "marian"), _BART),
    **dict.fromkeys(("mbart", "pegasus"), _MBART),
    **dict.fromkeys(("vit", "deit"), _VIT),
    "beit": _BEIT,
    "dinov2": _DINO,
    "swin": _SWIN,
    **dict.fromkeys(("clip_text_model", "clip_vision_model", "siglip_vision_model"), _CLIP),
}
"""Model type → its layers, or what they are by its configuration."""
