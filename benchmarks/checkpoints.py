"""A Llama-shaped checkpoint with random weights, and adapters for it.

python -m benchmarks.checkpoints DIRECTORY GIGABYTES
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

WIDE, INNER, KEYS, WORDS, FILES = 4096, 11008, 1024, 32000, 4
"""Hidden size, feed-forward size, size of keys and values, vocabulary, files."""
RANK, ALPHA = 16, 32
LINEAR = {
    "self_attn.q_proj": (WIDE, WIDE),
    "self_attn.k_proj": (KEYS, WIDE),
    "self_attn.v_proj": (KEYS, WIDE),
    "self_attn.o_proj": (WIDE, WIDE),
    "mlp.gate_proj": (INNER, WIDE),
    "mlp.up_proj": (INNER, WIDE),
    "mlp.down_proj": (WIDE, INNER),
}
ADAPTERS = {"q,v": ("self_attn.q_proj", "self_attn.v_proj"), "all-linear": tuple(LINEAR)}


def build(room: Path, gigabytes: float, files: int = FILES) -> int:
    """The base, of about that size, and the adapters beside it, in PEFT's format; how many layers it has."""
    layers = max(
        files, round((gigabytes * 1e9 - 4 * WORDS * WIDE) / 2 / sum(a * b for a, b in LINEAR.values()))
    )
    chance = torch.Generator().manual_seed(0)
    (room / "base").mkdir()
    places: dict[str, str] = {}
    for number in range(files):
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        held = dict(tensors(range(layers * number // files, layers * (number + 1) // files), chance))
        held |= {"model.embed_tokens.weight": normal(WORDS, WIDE, chance)} if number == 0 else {}
        if number == files - 1:
            held |= {
                "lm_head.weight": normal(WORDS, WIDE, chance),
                "model.norm.weight": torch.ones(WIDE).bfloat16(),
            }
        save_file(held, room / "base" / file, metadata={"format": "pt"})
        places |= dict.fromkeys(held, file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (room / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDE,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": WORDS,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (room / "base" / "config.json").write_text(json.dumps(config))
    for name, targets in ADAPTERS.items():
        adapter(room / name, targets, layers)
    return layers


def tensors(layers: range, chance: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    for layer in layers:
        prefix = f"model.layers.{layer}."
        yield from ((f"{prefix}{name}.weight", normal(*shape, chance)) for name, shape in LINEAR.items())
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{norm}.weight", torch.ones(WIDE).bfloat16()


def normal(rows: int, columns: int, chance: torch.Generator) -> Tensor:
    return (torch.randn(rows, columns, generator=chance) * 0.02).bfloat16()


def adapter(path: Path, targets: tuple[str, ...], layers: int, seed: int = 1) -> None:
    """Trained for a while, as far as sizes go: B is not zero."""
    chance, held = torch.Generator().manual_seed(seed), {}
    for layer in range(layers):
        for name in targets:
            key, (out, inner) = f"base_model.model.model.layers.{layer}.{name}", LINEAR[name]
            held[f"{key}.lora_A.weight"] = torch.randn(RANK, inner, generator=chance) * 0.01
            held[f"{key}.lora_B.weight"] = torch.randn(out, RANK, generator=chance) * 0.01
    path.mkdir()
    save_file(held, path / "adapter_model.safetensors", metadata={"format": "pt"})
    words = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA}
    said = {**words, "target_modules": [name.split(".")[1] for name in targets]}
    (path / "adapter_config.json").write_text(json.dumps(said))


if __name__ == "__main__":
    build(Path(sys.argv[1]), float(sys.argv[2]))
