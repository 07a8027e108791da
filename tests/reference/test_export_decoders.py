"""Decoders as ONNX: one graph for the prompt and for every step, equal to torch's forward without a cache."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import peftsurgery as ps
from peftsurgery.graph import weights
from peftsurgery.graph.export import trace
from peftsurgery.graph.generation import continuing, steps
from peftsurgery.graph.placement import placed
from peftsurgery.graph.sampling import Sampling
from peftsurgery.graph.session import Session
from peftsurgery.graph.signature import signature
from tests.output_subjects import FUSION
from tests.subjects import transformer

SCRATCH = TemporaryDirectory()
TOLERANCE = 1e-4
VOCAB = 101
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96}
CASES = {
    "LlamaForCausalLM": GROUPED,
    "Qwen2ForCausalLM": GROUPED,
    "Qwen3ForCausalLM": {**GROUPED, "head_dim": 16},
    "MistralForCausalLM": {**GROUPED, "sliding_window": 7},
    "GPT2LMHeadModel": OLD,
    "OPTForCausalLM": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "BloomForCausalLM": {"n_layer": 2, "n_head": 4},
    "GPTNeoXForCausalLM": {},
    "PhiForCausalLM": {},
    "GemmaForCausalLM": {**GROUPED, "head_dim": 8},
    "Gemma2ForCausalLM": {**GROUPED, "head_dim": 8, "sliding_window": 7},
    "Gemma3ForCausalLM": {**GROUPED, "head_dim": 8, "sliding_window": 7},
    "FalconForCausalLM": {},
    "GPTJForCausalLM": {**OLD, "rotary_dim": 4},
    "MixtralForCausalLM": {**GROUPED, "num_local_experts": 4},
    "Qwen3MoeForCausalLM": {**GROUPED, **EXPERTS, "head_dim": 16},
}
OUTPUTS = ("BloomForCausalLM", "GPTJForCausalLM")
SHALLOW = {"num_hidden_layers": 1, "n_layer": 1}
SPARSE = {"MixtralForCausalLM", "Qwen3MoeForCausalLM"}
WITHOUT_POSITIONS = {"BloomForCausalLM"}


@cache
def exported(name: str) -> tuple[nn.Module, Path]:
    model = transformer(name, {**SIZES, **CASES[name]}, spread=0.1)
    path = Path(mkdtemp(dir=SCRATCH.name)) / "model.onnx"
    weights.save(trace(model, signature(model)), path.parent)
    return model, path


class Steps:
    """A session that is fed a text in pieces, padded on the left."""

    def __init__(self, path: Path) -> None:
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.inputs = {port.name: port.shape for port in self.session.get_inputs()}

    def run(self, ids: np.ndarray, mask: np.ndarray, pieces: list[int]) -> np.ndarray:
        """The logits of every token, read piece by piece."""
        past = {
            name: np.zeros((len(ids), shape[1], 0, shape[3]), np.float32)
            for name, shape in self.inputs.items()
            if name.startswith("past_key_values")
        }
        found, start = [], 0
        for size in pieces:
            end = start + size
            feed = {
                "input_ids": ids[:, start:end],
                "attention_mask": mask[:, :end],
                "position_ids": np.maximum(mask.cumsum(1) - 1, 0)[:, start:end],
                **past,
            }
            logits, *present = self.session.run(None, {name: feed[name] for name in self.inputs})
            past = dict(zip(past, present, strict=True))
            found.append(logits)
            start = end
        return np.concatenate(found, 1)


def text(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(rows)
    mask = (np.arange(columns)[::-1] < np.arange(columns, columns - 3 * rows, -3)[:, None]).astype(np.int64)
    return np.where(mask, random.integers(3, VOCAB, mask.shape), 0), mask


def torch_says(model: nn.Module, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Each row by itself, without its padding and without a cache."""
    found = np.zeros((*ids.shape, VOCAB), np.float32)
    for row, (tokens, kept) in enumerate(zip(ids, mask.astype(bool), strict=True)):
        with torch.no_grad():
            found[row, kept] = model(torch.from_numpy(tokens[kept])[None], use_cache=False).logits[0].numpy()
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_text_read_at_once_or_in_pieces_is_torchs(name: str) -> None:
    model, path = exported(name)
    onnx.checker.check_model(str(path), full_check=True)
    steps = Steps(path)
    for rows, pieces in ((1, [5]), (1, [1, 1, 1]), (3, [14]), (3, [11, 1, 1, 1]), (2, [8, 6, 1])):
        ids, mask = text(rows, sum(pieces))
        apart = np.abs(steps.run(ids, mask, pieces) - torch_says(model, ids, mask))
        assert apart[mask.astype(bool)].max() <= TOLERANCE, (rows, pieces)


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_fusion_works_on_words_behind_a_past(name: str, tmp_path: Path) -> None:
    model = transformer(name, {**SIZES, **CASES[name], **SHALLOW}, spread=0.1)
    ids, mask = text(2, 9)
    plain = torch_says(model, ids, mask)
    ps.inject(model, FUSION, "mh_adapter,output_adapter", seed=0)
    noise = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=noise))
    weights.save(trace(model, signature(model)), tmp_path)
    expected = torch_says(model, ids, mask)
    assert np.abs(expected - plain).max() > 1e-3
    for pieces in ([9], [5, 3, 1]):
        apart = np.abs(Steps(tmp_path / "model.onnx").run(ids, mask, pieces) - expected)
        assert apart[mask.astype(bool)].max() <= TOLERANCE, pieces


@pytest.mark.parametrize("name", CASES)
def test_the_ports_are_those_that_optimum_gives(name: str) -> None:
    _, path = exported(name)
    steps = Steps(path)
    own = ["input_ids", "attention_mask", *([] if name in WITHOUT_POSITIONS else ["position_ids"])]
    cached = [f"past_key_values.{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    assert list(steps.inputs) == own + cached
    outputs = {port.name: port.shape for port in steps.session.get_outputs()}
    assert list(outputs) == ["logits", *(name.replace("past_key_values", "present") for name in cached)]
    total = "past_sequence_length + sequence_length"
    assert steps.inputs["attention_mask"] == ["batch_size", total]
    assert steps.inputs["past_key_values.0.key"][::2] == ["batch_size", "past_sequence_length"]
    assert outputs["present.0.key"][::2] == ["batch_size", total]
    assert outputs["logits"] == ["batch_size", "sequence_length", VOCAB]
    config = exported(name)[0].config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if name != "FalconForCausalLM":  # its configuration counts the heads of queries
        assert steps.inputs["past_key_values.1.value"][1] == heads


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_keeps_its_name(name: str) -> None:
    model, path = exported(name)
    held = {tensor.name for tensor in onnx.load(path).graph.initializer}
    lost = {parameter for parameter, _ in model.named_parameters()} - held
    assert not lost


@pytest.mark.parametrize("name", CASES)
def test_every_node_that_computes_has_a_cuda_kernel(name: str) -> None:
    graph = weights.load(exported(name)[1])
    found, loops = placed(graph), sum(node.op_type == "Loop" for node in graph.graph)
    assert loops == (4 if name in SPARSE else 0)
    # where an expert's words begin, and whether it has any, is asked on the CPU
    assert found.lost == () and found.device > found.shapes and found.copies <= 2 + 2 * loops


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_are_those_of_transformers(name: str) -> None:
    model, path = exported(name)
    ids, mask = text(3, 10)
    with torch.no_grad():
        expected = model.generate(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    found = np.stack([*steps(continuing(Session(path), mask), ids, Sampling(12))], 1)
    assert found.tolist() == expected[:, 10:].tolist()
