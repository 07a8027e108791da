"""Small real directories, and the command line as a person calls it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import peftsurgery as ps
from peftsurgery.cli import main


@pytest.fixture
def run() -> Callable[..., Result]:
    def call(*words: object) -> Result:
        result = CliRunner().invoke(main, [str(word) for word in words])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT saved as its bare base, without a head."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=99
    )
    path = tmp_path_factory.mktemp("bert")
    BertModel(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with tied embeddings, in several bf16 shards."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=99,
        tie_word_embeddings=True,
    )
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path, max_shard_size="20KB")
    return path


def adapter_for(model: torch.nn.Module, targets: str, out: Path, task: str | None = None) -> Path:
    """A trained-looking adapter in a directory."""
    ps.inject(model, ps.LoRA(r=4, lora_alpha=8), targets, task=task, seed=0)
    with torch.no_grad():
        for parameter in ps.trainable_parameters(model).values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return ps.save_adapter(ps.remove(model), out)


def digest(directory: Path) -> dict[str, str]:
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
