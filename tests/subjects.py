"""The subjects of the laws: small models of every shape that a method meets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCAB = 101


@dataclass(frozen=True)
class Subject:
    """A model, an input for it, and the words that select sites in it."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    targets: str
    dtype: torch.dtype = torch.float32

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build().to(self.dtype).eval()

    def run(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return output(model(**self.inputs()))

    def __str__(self) -> str:
        return self.name


def transformer(name: str, words: Mapping[str, Any], spread: float = 0.05) -> nn.Module:
    """A model of a class of transformers, no weight of it 0 or 1: as fresh, biases and norms would tell nothing."""
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**words)).eval()
    for parameter in model.parameters():
        parameter.data.add_(spread * torch.randn_like(parameter))
    return model


def output(result: Any) -> Tensor:
    return result.logits if hasattr(result, "logits") else result


class Vision(nn.Module):
    """Convolutions of one and two dimensions, strided and padded, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.mix = nn.Conv2d(8, 8, 1)
        self.line = nn.Conv1d(8, 6, 3, dilation=2, bias=False)
        self.head = nn.Linear(6, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        planes = self.mix(torch.relu(self.stem(pixels))).flatten(2)
        return self.head(self.line(planes).mean(-1))


class Scaled(nn.Embedding):
    """An embedding that does more than its class: only the definition of a fold says what it means."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 3.0


class Lookup(nn.Module):
    def __init__(self, embedding: type[nn.Embedding]) -> None:
        super().__init__()
        self.table = embedding(VOCAB, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))


def _bert() -> nn.Module:
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=VOCAB,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def _gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCAB, n_positions=64))


def _llama(tied: bool = False) -> nn.Module:
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=VOCAB,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def _t5() -> nn.Module:
    config = T5Config(
        d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, vocab_size=VOCAB, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config)


def _ids(rows: int = 2, length: int = 7) -> Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def _tokens() -> dict[str, Tensor]:
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": _ids(), "attention_mask": mask}


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


LINEAR = Subject(
    "linear",
    lambda: nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 5, bias=False)),
    lambda: {"input": _noise(3, 8)},
    "0,2",
)
CONV = Subject("conv", Vision, lambda: {"pixels": _noise(2, 3, 9, 9)}, "stem,mix,line,head")
EMBEDDING = Subject("embedding", lambda: Lookup(nn.Embedding), lambda: {"ids": _ids()}, "table,head")
SUBCLASS = Subject("subclass", lambda: Lookup(Scaled), lambda: {"ids": _ids()}, "table")
ENCODER = Subject("encoder", _bert, _tokens, "query,value,dense,word_embeddings")
CONV1D = Subject("gpt2-conv1d", _gpt2, _tokens, "c_attn,c_proj,c_fc")
GQA = Subject("llama-gqa", _llama, _tokens, "all-linear")
TIED = Subject("llama-tied", lambda: _llama(tied=True), _tokens, "q_proj,v_proj,down_proj")
SEQ2SEQ = Subject("t5", _t5, lambda: {**_tokens(), "decoder_input_ids": _ids(2, 4)}, "q,v,wo")
BF16 = Subject("llama-bf16", _llama, _tokens, "q_proj,v_proj,up_proj", torch.bfloat16)

SUBJECTS = (LINEAR, CONV, EMBEDDING, SUBCLASS, ENCODER, CONV1D, GQA, TIED, SEQ2SEQ, BF16)
