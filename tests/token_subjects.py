"""The subjects of the token laws: a small model of every architecture that virtual tokens are tried on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

VOCAB, LENGTH, PAD = 67, 7, 1
NARROW = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_labels": 3,
}
BERTS = {**NARROW, "intermediate_size": 48, "max_position_embeddings": 40, "pad_token_id": PAD}
LLAMAS = {**BERTS, "num_key_value_heads": 2}


@dataclass(frozen=True)
class TokenSubject:
    """A model and the family whose inputs it takes: `encoder`, `decoder` or `seq2seq`."""

    name: str
    family: str
    build: Callable[[], nn.Module]

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.build().eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():  # an attention that starts near zero looks at everything alike
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return model

    def inputs(self, padded: bool = True) -> dict[str, Tensor]:
        """Two rows of ids; encoders are padded on the right, what generates on the left."""
        ids = torch.randint(3, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(2))
        mask = torch.ones_like(ids)
        if padded:
            mask[1, slice(-2, None) if self.family != "decoder" else slice(2)] = 0
            ids = ids.masked_fill(mask == 0, PAD)
        call = {"input_ids": ids, "attention_mask": mask}
        if self.family == "seq2seq":
            call["decoder_input_ids"] = ids[:, :4].clamp(min=3)
        return call

    def run(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(**self.inputs()).logits

    def __str__(self) -> str:
        return self.name


def _encoder(name: str, config: type, **more: Any) -> TokenSubject:
    head = config.__name__.replace("Config", "ForSequenceClassification")
    return TokenSubject(name, "encoder", lambda: getattr(tf, head)(config(**{**BERTS, **more})))


def _decoder(name: str, model: type, config: type, **words: Any) -> TokenSubject:
    ends = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": PAD}
    return TokenSubject(name, "decoder", lambda: model(config(**{**words, **ends})))


def _distilbert() -> nn.Module:
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
    words = {"vocab_size": VOCAB, "max_position_embeddings": 40, "num_labels": 3, "pad_token_id": PAD}
    return tf.DistilBertForSequenceClassification(tf.DistilBertConfig(**sizes, **words))


def _t5() -> nn.Module:
    ends = {"decoder_start_token_id": 0, "eos_token_id": None, "pad_token_id": PAD}
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 3, "num_heads": 4}
    return tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=VOCAB, **sizes, **ends))


def _bart() -> nn.Module:
    ends = {
        "decoder_start_token_id": 0,
        "eos_token_id": None,
        "forced_eos_token_id": None,
        "pad_token_id": PAD,
    }
    halves = {
        f"{half}_{word}": value
        for half in ("encoder", "decoder")
        for word, value in {"layers": 2, "attention_heads": 4, "ffn_dim": 48}.items()
    }
    config = tf.BartConfig(vocab_size=VOCAB, d_model=32, max_position_embeddings=40, **halves, **ends)
    return tf.BartForConditionalGeneration(config)


MODERN = {"local_attention": 6, "global_attn_every_n_layers": 2, "cls_token_id": 3, "sep_token_id": 4}
DEBERTA = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "type_vocab_size": 0,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "n_positions": 40}
OPT = {**NARROW, "ffn_dim": 48, "max_position_embeddings": 40, "word_embed_proj_dim": 32}

SUBJECTS = (
    _encoder("bert", tf.BertConfig),
    _encoder("roberta", tf.RobertaConfig),
    _encoder("electra", tf.ElectraConfig, embedding_size=16),
    _encoder("mpnet", tf.MPNetConfig),
    _encoder("albert", tf.AlbertConfig, embedding_size=16),
    TokenSubject("distilbert", "encoder", _distilbert),
    _encoder("modernbert", tf.ModernBertConfig, bos_token_id=3, eos_token_id=4, **MODERN),
    _encoder("deberta-v2", tf.DebertaV2Config, position_buckets=4, position_biased_input=False, **DEBERTA),
    _decoder("gpt2", tf.GPT2LMHeadModel, tf.GPT2Config, **GPT2),
    _decoder("llama-gqa", tf.LlamaForCausalLM, tf.LlamaConfig, **LLAMAS),
    _decoder("opt", tf.OPTForCausalLM, tf.OPTConfig, **OPT),
    _decoder("qwen2", tf.Qwen2ForCausalLM, tf.Qwen2Config, **LLAMAS),
    TokenSubject("t5", "seq2seq", _t5),
    TokenSubject("bart", "seq2seq", _bart),
)
