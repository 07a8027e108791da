"""The subjects of the output laws: every architecture whose sublayers are known, and every form of the methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

import peftsurgery as ps
from peftsurgery.method import OutputMethod
from tests.subjects import transformer
from tests.token_subjects import BERTS, LLAMAS, NARROW, PAD
from tests.token_subjects import SUBJECTS as WORDS

BOTH = "mh_adapter,output_adapter"
FEATURES = "feature-extraction"


@dataclass(frozen=True)
class OutputSubject:
    """A model and an input for it."""

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]

    def run(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return self.output(model)

    def output(self, model: nn.Module) -> Tensor:
        return model(**self.inputs()).logits

    def __str__(self) -> str:
        return self.name


def _vit(name: str = "ViT") -> nn.Module:
    torch.manual_seed(0)
    words = {**NARROW, "intermediate_size": 48, "image_size": 8, "patch_size": 4}
    config = getattr(tf, f"{name}Config")(**words)
    return getattr(tf, f"{name}ForImageClassification")(config).eval()


def _pair(model: type, config: type) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"d_model": 32, "vocab_size": 67, "max_position_embeddings": 40, "pad_token_id": PAD}
        halves = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}
        own = {f"{half}_{word}": value for half in ("encoder", "decoder") for word, value in halves.items()}
        return model(config(**sizes, **own, decoder_start_token_id=0, eos_token_id=2)).eval()

    return build


def _pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))}


def _causal(model: type, config: type, **more: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return model(config(**{**LLAMAS, **more})).eval()

    return build


def _made(name: str, cls: str, inputs: Callable[[], dict[str, Tensor]], **own: Any) -> OutputSubject:
    """A model no weight of which is 0 or 1: a layer's scale counts, and attention looks about."""
    words = {"attn_implementation": "eager", **own}
    return OutputSubject(name, lambda: transformer(cls, words, spread=0.1), inputs)


def _decoder(name: str, cls: str, **own: Any) -> OutputSubject:
    return _made(name, f"{cls}ForCausalLM", WORDS[9].inputs, **{**BERTS, **own})


def _crossed() -> dict[str, Tensor]:
    text = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))
    return {**WORDS[0].inputs(), "encoder_hidden_states": text}


def _image(name: str, cls: str, pixels: Callable[[], dict[str, Tensor]], **own: Any) -> OutputSubject:
    return _made(name, f"{cls}ForImageClassification", pixels, **own)


def _large() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))}


OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "vocab_size": 67}
SMALL = {**NARROW, "intermediate_size": 48, "image_size": 8, "patch_size": 4}
SHIFTED = {
    **{"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4]},
    **{"window_size": 4, "num_labels": 3},
}
EXPERTS = {"num_key_value_heads": 2, "num_local_experts": 4}

SUBJECTS = (
    *(OutputSubject(subject.name, subject.model, subject.inputs) for subject in WORDS),
    OutputSubject("vit", _vit, _pixels),
    OutputSubject("qwen3", _causal(tf.Qwen3ForCausalLM, tf.Qwen3Config, head_dim=8), WORDS[9].inputs),
    OutputSubject("gemma", _causal(tf.GemmaForCausalLM, tf.GemmaConfig, head_dim=8), WORDS[9].inputs),
    OutputSubject("gemma3", _causal(tf.Gemma3ForCausalLM, tf.Gemma3TextConfig, head_dim=8), WORDS[9].inputs),
    OutputSubject("mbart", _pair(tf.MBartForConditionalGeneration, tf.MBartConfig), WORDS[13].inputs),
    OutputSubject("marian", _pair(tf.MarianMTModel, tf.MarianConfig), WORDS[13].inputs),
    OutputSubject("deit", partial(_vit, "DeiT"), _pixels),
    OutputSubject("mistral", _causal(tf.MistralForCausalLM, tf.MistralConfig), WORDS[9].inputs),
    _decoder("opt-late", "OPT", ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False),
    _decoder("bloom", "Bloom", n_layer=2, n_head=4),
    _decoder("bloom-late", "Bloom", n_layer=2, n_head=4, apply_residual_connection_post_layernorm=True),
    _made("gptj", "GPTJForCausalLM", WORDS[9].inputs, **OLD, rotary_dim=4),
    _decoder("phi", "Phi"),
    _decoder("gpt-neox", "GPTNeoX"),
    _decoder("gpt-neox-in-turn", "GPTNeoX", use_parallel_residual=False),
    _decoder("falcon", "Falcon"),
    _decoder("falcon-in-turn", "Falcon", parallel_attn=False, alibi=True),
    _decoder("falcon-two-norms", "Falcon", new_decoder_architecture=True, num_kv_heads=2),
    _decoder(
        "falcon-one-norm", "Falcon", new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1
    ),
    _decoder("mixtral", "Mixtral", **EXPERTS),
    _made("bert-crossed", "BertLMHeadModel", _crossed, **BERTS, is_decoder=True, add_cross_attention=True),
    _image("beit", "Beit", _pixels, **SMALL),
    _image("dinov2", "Dinov2", _pixels, **SMALL),
    _image("swin", "Swin", _large, **SHIFTED),
)
FEW = tuple(
    subject
    for subject in SUBJECTS
    if subject.name in ("bert", "distilbert", "llama-gqa", "opt", "t5", "bart", "vit", "bloom", "phi", "beit")
)
"""One of every way in which a layer adds, drops and normalises."""

# No relu: a dead unit has no gradient, and small models have many.

PFEIFFER = ps.Bottleneck(bottleneck_size=3, original_ln_before=True, non_linearity="gelu")
HOULSBY = ps.Bottleneck(bottleneck_size=3, non_linearity="swish", dropout=0.1)
PARALLEL = ps.Bottleneck(
    bottleneck_size=5, is_parallel=True, scaling=4.0, init_weights="mam_adapter", non_linearity="tanh"
)
NORMED = ps.Bottleneck(
    bottleneck_size=3, ln_before=True, ln_after=True, scaling="channel", non_linearity="gelu"
)
FINAL = replace(PFEIFFER, original_ln_after=False, residual_before_ln=False)
FUSION = ps.AdapterFusion((("a", PFEIFFER), ("b", replace(PFEIFFER, bottleneck_size=2, scaling=0.5))))
METHODS: dict[str, OutputMethod] = {
    "pfeiffer": PFEIFFER,
    "houlsby": HOULSBY,
    "parallel": PARALLEL,
    "normed": NORMED,
    "final": FINAL,
    "fusion": FUSION,
}


def trained(subject: OutputSubject, method: OutputMethod, name: str = "default", seed: int = 0) -> ps.Adapter:
    """An adapter for the subject whose every parameter is away from its start."""
    model = ps.inject(subject.model(), method, BOTH, name=name, seed=seed, task=FEATURES)
    generator = torch.Generator().manual_seed(seed + 1)
    adapter = ps.remove(model, name)
    for _, tensor in adapter.tensors():
        tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    return adapter
