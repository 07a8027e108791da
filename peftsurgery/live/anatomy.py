"""Where the parts of an architecture are: the only file that knows such names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from inspect import signature
from typing import Any

from torch import Tensor, nn

from peftsurgery.errors import NoSiteMatched, PlanError, UnsupportedSite, listing, nearest
from peftsurgery.live.grafts import Graft
from peftsurgery.live.sites import walk
from peftsurgery.site import Kind, Layout, Site
from peftsurgery.tasks import Task

ENCODERS = {
    **dict.fromkeys(
        ("bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta-v2"), "attention.self"
    ),
    **dict.fromkeys(("albert", "distilbert"), "attention"),
    "mpnet": "attention.attn",
    "modernbert": "attn",
}
"""Model type → how the names of its self-attention modules end, for bidirectional encoders."""

CAUSAL = ("self_attn", "attn", "SelfAttention", "self_attention", "attention")
"""How the names of self-attention modules end where keys and values are cached; the first that is there."""

SKIPS_PADDING = frozenset({"roberta", "xlm-roberta", "camembert", "mpnet"})
"""Encoders that number only the tokens that are no padding, from `padding_idx` + 1 on."""

RELATIVE = frozenset({"deberta-v2"})
"""Encoders that number no word, unless they have a table of positions: only distances count there."""

POSITIONS = ("position_embeddings", "wpe", "embed_positions")
"""The names of tables of learned positions."""

PER_TOKEN = ("ForTokenClassification", "ForMaskedLM", "ForCausalLM", "ForPreTraining", "LMHeadModel")
"""How the names of classes end whose labels are one per token."""

PER_ROW = ("ForSequenceClassification", "ForMultipleChoice", "ForNextSentencePrediction")
"""How the names of classes end that give one answer for a whole row."""

POOLING = "score"
"""The head of decoders that classify by the last word which is no padding; encoders call theirs otherwise."""


def model_type(model: nn.Module) -> str | None:
    """The word for the architecture in `config.json`; None for a model without one."""
    config: Any = getattr(model, "config", None)
    return getattr(config, "model_type", None) or None


def output_embeddings(model: nn.Module) -> tuple[str, ...]:
    """The names of the module that turns hidden states into logits; `all-linear` passes over it."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    return tuple(name for name, module in walk(model) if head is not None and module is head)


def heads(model: nn.Module, wanted: Iterable[str] | None, task: Task | None) -> tuple[str, ...]:
    """The full names of the modules that get a trainable copy: the wanted ones and the task's own.

    Like PEFT, which loads what is saved of them, it takes every module whose name ends so: DistilBERT's
    `pre_classifier` with its `classifier`.

    Raises:
        NoSiteMatched: a wanted one that the model has not got.
    """
    names = [name for name, _ in walk(model)]
    implied = task.heads if task is not None else ()
    explicit = [name for word in wanted or () for name in _head(word, names, model)]
    return tuple(name for name in names if name.endswith((*implied, *explicit)))


def _head(word: str, names: list[str], model: nn.Module) -> list[str]:
    found = [name for name in names if name == word or name.endswith(f".{word}")]
    if not found:
        near = nearest(word, names)
        raise NoSiteMatched(
            f"modules_to_save: {word!r} is no module of {type(model).__name__}. Nearest: {listing(near)}. "
            "Nothing was changed.",
            pattern=word,
            nearest=near,
        )
    return found


def label_weights(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The (labels, hidden) weights among an adapter's heads: the last map of a classifier."""
    ends = (".classifier.weight", ".classifier.out_proj.weight", ".score.weight", ".qa_outputs.weight")
    return [tensor for name, tensor in tensors.items() if f".{name}".endswith(ends)]


class Family(Enum):
    """How an architecture reads its input."""

    ENCODER = "encoder"
    DECODER = "decoder"
    ENCODER_DECODER = "encoder-decoder"


@dataclass(frozen=True, slots=True)
class Body:
    """Where the virtual tokens of a model enter.

    Args:
        family: how it reads.
        embedding: the name of the word embeddings that a prompt goes with: the encoder's, if there are two.
        trunk: the name of the stack of layers that a prefix goes to: the decoder, where there are two; `""`
            is the model itself.
        memory: the name of the encoder of an encoder-decoder, which a prompt goes to.
        padding: for encoders that number only what is no padding: the padding token's id.
        per_token: whether the labels are one per token.
        pooled: whether it is a decoder that looks for the last word among the input ids.
    """

    family: Family
    embedding: str
    trunk: str
    memory: str = ""
    padding: int | None = None
    per_token: bool = False
    pooled: bool = False


def body(model: nn.Module) -> Body:
    """Where the virtual tokens of a model enter.

    Raises:
        PlanError: it has no word embeddings or takes none in the place of words, or is no transformers model.
    """
    config: Any = getattr(model, "config", None)
    embedding = _embedding(model) if config is not None else None
    if embedding is None:
        raise PlanError(
            f"{type(model).__name__} is no transformers model with word embeddings, so virtual tokens have "
            "no place to enter. Take LoRA for it; nothing was changed."
        )
    if "inputs_embeds" not in signature(model.forward).parameters:
        raise PlanError(
            f"{type(model).__name__} takes no embeddings in the place of words (`inputs_embeds`), so virtual tokens "
            "have no place to enter. Take LoRA for it; nothing was changed."
        )
    if config.is_encoder_decoder:
        memory = _half(model, "get_encoder")
        within = _embedding(model.get_submodule(memory)) or embedding
        return Body(Family.ENCODER_DECODER, f"{memory}.{within}", _half(model, "get_decoder"), memory)
    per_token = type(model).__name__.endswith(PER_TOKEN)
    if config.model_type in ENCODERS and not getattr(config, "is_decoder", False):
        prefix = str(getattr(model, "base_model_prefix", ""))
        padding = config.pad_token_id if config.model_type in SKIPS_PADDING else None
        trunk = prefix if prefix in model._modules else ""
        return Body(Family.ENCODER, embedding, trunk, padding=padding, per_token=per_token)
    pooled = POOLING in model._modules and not per_token
    return Body(Family.DECODER, embedding, _half(model, "get_decoder"), per_token=per_token, pooled=pooled)


def embedding_below(model: nn.Module, stack: str) -> str:
    """The name, below a stack of layers, of the word embeddings that it looks words up in."""
    return _embedding(model.get_submodule(stack)) or ""


def _embedding(stack: nn.Module) -> str | None:
    found = stack.get_input_embeddings()  # type: ignore[operator]
    return next((name for name, module in walk(stack) if module is found), None)


def _half(model: nn.Module, getter: str) -> str:
    half = getattr(model, getter)()
    return next((name for name, module in walk(model) if module is half), "")


def token_sites(model: nn.Module, kinds: Iterable[Kind]) -> tuple[Site, ...]:
    """The sites where virtual tokens enter: the word embeddings, or every layer's attention in order.

    ALBERT's layers are one module under one name, so it has one such site.

    Raises:
        PlanError, UnsupportedSite: the model has no such place.
    """
    place = body(model)
    if Kind.TOKENS in kinds:
        table = model.get_submodule(place.embedding).weight
        assert isinstance(table, Tensor)
        return (Site(place.embedding, Kind.TOKENS, tuple(table.shape), Layout.IN_OUT),)
    shape = _heads(model, place.family)
    return tuple(Site(name, Kind.ATTENTION, shape) for name in _attentions(model, place))


def pooling_stack(model: nn.Module) -> str | None:
    """The name of an encoder's layers, whose first token is pooled after them; None where none is.

    A pooler stands beside the layers, or a head above them takes the first token itself.
    """
    trunk = str(getattr(model, "base_model_prefix", ""))
    trunk = trunk if trunk in model._modules else ""
    above = model.get_submodule(trunk)
    averaged = getattr(getattr(model, "config", None), "classifier_pooling", "cls") != "cls"
    if averaged:
        return None
    if above._modules.get("pooler") is not None:
        return f"{trunk}.encoder" if trunk else "encoder"
    return trunk or None if type(model).__name__.endswith(PER_ROW) else None


def position_limit(stack: nn.Module) -> int | None:
    """The longest input that a stack of layers has positions for; None where positions are computed."""
    found = position_table(stack)
    return None if found is None else found[1].num_embeddings - found[2]


def position_table(stack: nn.Module) -> tuple[str, nn.Embedding, int] | None:
    """The table of learned positions: its name, itself, and the row of the first word."""
    for name, module in walk(stack):
        root = module.root if isinstance(module, Graft) else module
        if name.rpartition(".")[2] in POSITIONS and isinstance(root, nn.Embedding):
            padding = -1 if root.padding_idx is None else root.padding_idx
            return name, root, int(getattr(root, "offset", padding + 1))
    return None


def numbers_words(model: nn.Module, stack: str) -> bool:
    """Whether the words of an encoder have positions, so that it matters from where they are numbered."""
    config: Any = model.config
    return config.model_type not in RELATIVE or position_limit(model.get_submodule(stack)) is not None


def _attentions(model: nn.Module, place: Body) -> list[str]:
    config: Any = model.config
    known = place.family is Family.ENCODER
    caches = known or "past_key_values" in signature(model.get_submodule(place.trunk).forward).parameters
    ends = () if not caches else (ENCODERS[config.model_type],) if known else CAUSAL
    inside = f"{place.trunk}." if place.trunk else ""
    names = [name for name, _ in walk(model) if name.startswith(inside)]
    for end in ends:
        found = [name for name in names if f".{name}".endswith(f".{end}")]
        if found:
            return found
    raise UnsupportedSite(
        f"{type(model).__name__} ({config.model_type}) has no attention that a prefix is known to fit. "
        "Take prompt tuning for it; nothing was changed.",
        site=place.trunk,
    )


def _heads(model: nn.Module, family: Family) -> tuple[int, int]:
    """(kv_heads, head_dim) of every layer."""
    config: Any = model.config
    words = (
        ("decoder_attention_heads", "num_heads")
        if family is Family.ENCODER_DECODER
        else ("num_attention_heads",)
    )
    heads = int(next(value for word in words if (value := getattr(config, word, None))))
    wide = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    return _kv_heads(config, heads), int(wide or config.hidden_size // heads)


def _kv_heads(config: Any, heads: int) -> int:
    """How many heads the keys and values of a layer have; Falcon's older layers share one pair among all."""
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1
    words = ("num_key_value_heads", "num_kv_heads")
    return int(next((value for word in words if (value := getattr(config, word, None))), heads))
