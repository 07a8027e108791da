"""Encoder-decoders as two graphs: what the encoder makes of a text once, and the decoder that goes on from it.

The keys and values of the decoder's cross-attention depend on the source text alone, so the encoder's graph
computes them, and the decoder's graph serves the first token and every later one without a branch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from peftsurgery.graph.cache import PARTS, PAST, PRESENT, Constant, joined
from peftsurgery.graph.posture import blind
from peftsurgery.graph.signature import BATCH, BEFORE, LENGTH, SOURCE, WRITTEN, Port, Signature, dtype_of

SINGLE, ENCODER, DECODER = "model.onnx", "encoder_model.onnx", "decoder_model.onnx"
"""The names of the files: of a model that is one graph, and of an encoder-decoder."""
OWN, CROSS = "decoder", "encoder"
"""Whose keys and values they are: of what the decoder wrote, or of the source text."""
MASK = "encoder_attention_mask"
INSIDE = "model."
"""What the names of a model's parameters begin with in its halves."""
Entries = Sequence[tuple[Tensor, Tensor]]
"""Keys and values of every layer, each (heads, tokens, head_dim)."""


@dataclass(frozen=True, slots=True)
class Half:
    """One of the two graphs.

    Args:
        file: the name of its file.
        module: what computes it, from inputs by name to outputs by name.
        part: the module of the model that it is of.
    """

    file: str
    module: nn.Module
    signature: Signature
    part: nn.Module


def halves(model: nn.Module, whole: Signature, prefix: Entries = ()) -> tuple[Half, Half]:
    """The encoder and the decoder of a model whose signature is `whole`.

    Args:
        prefix: what stands in front of the keys and values that the decoder sees of itself.
    """
    source, writer = Source(model), Writer(model, prefix)
    texts = tuple(port for port in whole.inputs if port.axes == (BATCH, LENGTH))
    given = _probed(source, model)
    hidden = next(port for port in whole.outputs if port.name != "logits")
    length = str(hidden.axes[1])
    crossed = _ports(PRESENT, CROSS, given, length)
    memory = _ports(PAST, CROSS, given, length.replace(LENGTH, SOURCE, 1))
    before = _ports(PAST, OWN, given, BEFORE)
    after = _ports(PRESENT, OWN, given, f"{BEFORE} + {WRITTEN}")
    logits = next(port for port in whole.outputs if port.name == "logits")
    first = replace(whole, inputs=texts, outputs=(replace(hidden, name="last_hidden_state"), *crossed))
    read = (Port("input_ids", "int64", (BATCH, WRITTEN)), Port(MASK, "int64", (BATCH, SOURCE)))
    second = replace(whole, inputs=(*read, *before, *memory), outputs=(logits, *after))
    whose: Any = model
    return (
        Half(ENCODER, source, first, whose.get_encoder()),
        Half(DECODER, writer, second, whose.get_decoder()),
    )


def run(half: nn.Module, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The outputs of a half by name."""
    return half(**feeds)  # type: ignore[no-any-return]


def name(kind: str, layer: int, whose: str, part: str) -> str:
    """`past_key_values.0.decoder.key`, `present.3.encoder.value`."""
    return f"{kind}.{layer}.{whose}.{part}"


def _probed(source: nn.Module, model: nn.Module) -> list[Tensor]:
    """The keys and values of the cross-attention, of two short rows."""
    ids = torch.ones((2, 3), dtype=torch.long, device=next(model.parameters()).device)
    with blind(model):
        given = source(input_ids=ids, attention_mask=ids)
    return [tensor for word, tensor in given.items() if word.startswith(PRESENT)]


def _ports(kind: str, whose: str, given: Sequence[Tensor], length: str) -> tuple[Port, ...]:
    return tuple(
        Port(
            name(kind, at // 2, whose, PARTS[at % 2]),
            dtype_of(tensor),
            (BATCH, tensor.shape[1], length, tensor.shape[3]),
        )
        for at, tensor in enumerate(given)
    )


class Inside(nn.Module):
    """A part of a model, which stands as the whole of it stands."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def config(self) -> Any:
        return self.model.config

    def set_attn_implementation(self, name: str) -> None:
        self.model.set_attn_implementation(name)  # type: ignore[operator]


class Source(Inside):
    """The encoder, and what the decoder's cross-attention makes of its output: (batch, heads, length, head_dim)."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        model: Any = self.model
        hidden = model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)[0]
        # One token goes through the decoder for its cache alone; what else it computes leaves with the dead code.
        start = torch.zeros_like(input_ids[:, :1])
        said = model(
            encoder_outputs=(hidden,), attention_mask=attention_mask, decoder_input_ids=start, use_cache=True
        )
        crossed = said.past_key_values.cross_attention_cache
        return {"last_hidden_state": hidden, **_named(crossed, CROSS)}


class Writer(Inside):
    """The decoder: the tokens that it wrote before come as keys and values, and so does the source text.

    A prefix stands in front of the keys and values of every call, and never goes out.
    """

    def __init__(self, model: nn.Module, prefix: Entries = ()) -> None:
        super().__init__(model)
        self.prefix = nn.ModuleList(Constant(key, value) for key, value in prefix)
        self.count = prefix[0][0].shape[1] if prefix else 0

    def forward(self, input_ids: Tensor, encoder_attention_mask: Tensor, **past: Tensor) -> dict[str, Tensor]:
        model: Any = self.model
        cache = self._cache(past)
        first = past[name(PAST, 0, CROSS, "key")]
        # With its keys at hand the decoder asks the encoder's output for its length only.
        hidden = first.new_zeros(()).expand(first.shape[0], first.shape[2], model.config.hidden_size)
        said = model(
            encoder_outputs=(hidden,),
            attention_mask=encoder_attention_mask,
            decoder_input_ids=input_ids,
            past_key_values=cache,
            use_cache=True,
        )
        own = said.past_key_values.self_attention_cache
        return {"logits": said.logits, **_named(own, OWN, self.count)}

    def _cache(self, past: Mapping[str, Tensor]) -> Any:
        from transformers import DynamicCache, EncoderDecoderCache

        layers = range(len(past) // 4)
        own, crossed = ([_pair(past, at, whose) for at in layers] for whose in (OWN, CROSS))
        constants: Iterable[Any] = self.prefix
        for at, entry in enumerate(constants):
            key, value = own[at]
            own[at] = joined(entry.key, key), joined(entry.value, value)
        made = EncoderDecoderCache(DynamicCache(own), DynamicCache())
        made.cross_attention_cache = DynamicCache(crossed)
        made.is_updated = dict.fromkeys(layers, True)
        return made


def _pair(past: Mapping[str, Tensor], layer: int, whose: str) -> tuple[Tensor, Tensor]:
    return past[name(PAST, layer, whose, "key")], past[name(PAST, layer, whose, "value")]


def _named(cache: Any, whose: str, count: int = 0) -> dict[str, Tensor]:
    return {
        name(PRESENT, i, whose, part): tensor[:, :, count:]
        for i, layer in enumerate(cache.layers)
        for part, tensor in zip(PARTS, (layer.keys, layer.values), strict=True)
    }
