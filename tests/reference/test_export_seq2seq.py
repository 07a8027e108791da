"""Encoder-decoders as two graphs: ONNX Runtime agrees with torch, token by token, with every method on them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import peftsurgery as ps
from peftsurgery.cli import main
from peftsurgery.graph.generation import Decoder
from peftsurgery.graph.pair import Pair
from peftsurgery.graph.sampling import Sampling
from peftsurgery.graph.seq2seq import DECODER, ENCODER
from peftsurgery.graph.signature import signature
from tests.subjects import transformer

T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 1, "num_heads": 4}
LAYERS = {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
BART = {"d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4, **LAYERS}
WORDS = {"vocab_size": 101, "decoder_start_token_id": 2, "pad_token_id": 0, "eos_token_id": 1}
PLACES = {**WORDS, "max_position_embeddings": 96, "forced_eos_token_id": None}


ROWS = [[5, 9, 2, 33, 7, 8], [44, 3, 61], [12, 90, 17, 5]]


@dataclass(frozen=True)
class Case:
    """A class of transformers, its sizes, and what its checkpoints' configuration forces on generated text."""

    name: str
    sizes: tuple[tuple[str, Any], ...]
    forced: tuple[tuple[str, Any], ...] = ()
    spread: float = 0.3

    def model(self) -> nn.Module:
        model = transformer(self.name, dict(self.sizes), self.spread)
        for word, value in self.forced:
            setattr(model.generation_config, word, value)
        return model

    def __str__(self) -> str:
        return self.name


def case(name: str, *sizes: dict[str, Any], **own: Any) -> Case:
    return Case(name, tuple({key: value for some in (*sizes, own) for key, value in some.items()}.items()))


SMALL_T5 = case("T5ForConditionalGeneration", T5, WORDS)
GATED = replace(
    case("T5ForConditionalGeneration", T5, WORDS, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    spread=0.15,
)
SMALL_BART = case("BartForConditionalGeneration", BART, PLACES, scale_embedding=True)
SMALL_MBART = replace(
    case("MBartForConditionalGeneration", BART, PLACES), forced=(("forced_bos_token_id", 77),)
)
SMALL_PEGASUS = replace(
    case("PegasusForConditionalGeneration", BART, PLACES), forced=(("suppress_tokens", [7, *range(20, 60)]),)
)
SMALL_MARIAN = replace(
    case("MarianMTModel", BART, PLACES),
    forced=(("bad_words_ids", [[0], [65], [3, 4]]), ("forced_eos_token_id", 1)),
    spread=0.5,
)
OTHERS = (GATED, SMALL_MBART, SMALL_PEGASUS, SMALL_MARIAN)
BOTTLENECK = ps.Bottleneck(bottleneck_size=4, non_linearity="gelu")
EVERYWHERE = "mh_adapter,cross_adapter,output_adapter"
METHODS = {
    "merged": (ps.LoRA(r=3), True, {}),
    "factored": (ps.LoRA(r=3), True, {"factored": True}),
    "bottleneck": (BOTTLENECK, EVERYWHERE, {}),
    "prompt": (ps.PromptTuning(num_virtual_tokens=5), None, {}),
    "prefix": (ps.PrefixTuning(num_virtual_tokens=4), None, {}),
}


def trained(model: nn.Module, method: str) -> ps.Adapter:
    """An adapter that moves the outputs; the model is as before."""
    formula, targets, _ = METHODS[method]
    words = (
        ("q,k,v,wo" if "T5" in type(model).__name__ else "q_proj,k_proj,v_proj,fc1")
        if targets is True
        else targets
    )
    ps.inject(model, formula, **({} if words is None else {"targets": words}), seed=0)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in ps.trainable_parameters(model).values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=noise))
    return ps.remove(model)


def texts() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 101, (2, 9), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def logits(model: nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(**texts(), decoder_input_ids=texts()["input_ids"][:, :4]).logits.numpy()


def transformers_writes(model: nn.Module, count: int = 10) -> list[list[int]]:
    """The greedy tokens of all rows, padded on the right, after the token that begins."""
    width = max(map(len, ROWS))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in ROWS])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ROWS])
    with torch.no_grad():
        found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=count, do_sample=False)
    return found[:, 1:].tolist()


def we_write(directory: Path, count: int = 10) -> list[list[int]]:
    """As transformers gives it: behind its end a row is padded."""
    decoder = Decoder(directory)
    rows = np.stack([*decoder.steps(ROWS, Sampling(count))], 1).tolist()
    for row in rows:
        end = next((i for i, token in enumerate(row) if token in decoder.rules.ends), len(row))
        row[end + 1 :] = [decoder.rules.pad] * len(row[end + 1 :])
    return rows


def pair(directory: Path) -> Pair:
    return Pair(directory / ENCODER, directory / DECODER)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """T5 without an adapter."""
    out = tmp_path_factory.mktemp("t5") / "onnx"
    ps.export_onnx(SMALL_T5.model(), out=out)
    return out


def test_ports_are_optimums(plain: Path) -> None:
    encoder, decoder = (onnx.load(plain / name).graph for name in (ENCODER, DECODER))
    assert _ports(encoder.input) == {
        name: ["batch_size", "sequence_length"] for name in ("input_ids", "attention_mask")
    }
    crossed = {f"{i}.encoder.{part}" for i in range(1) for part in ("key", "value")}
    own = {f"{i}.decoder.{part}" for i in range(1) for part in ("key", "value")}
    assert set(_ports(encoder.output)) == {"last_hidden_state", *(f"present.{n}" for n in crossed)}
    read = _ports(decoder.input)
    assert set(read) == {
        "input_ids",
        "encoder_attention_mask",
        *(f"past_key_values.{n}" for n in crossed | own),
    }
    assert read["past_key_values.0.decoder.key"] == ["batch_size", 4, "past_decoder_sequence_length", 8]
    assert read["past_key_values.0.encoder.key"] == ["batch_size", 4, "encoder_sequence_length", 8]
    given = _ports(decoder.output)
    assert set(given) == {"logits", *(f"present.{n}" for n in own)}
    assert given["logits"] == ["batch_size", "decoder_sequence_length", 101]


def test_nothing_of_the_source_is_computed_twice(plain: Path) -> None:
    """Every parameter but the word embeddings is in one of the two graphs."""
    model = SMALL_T5.model()
    encoder, decoder = (
        {tensor.name for tensor in onnx.load(plain / name).graph.initializer} for name in (ENCODER, DECODER)
    )
    parameters = {name for name, _ in model.named_parameters()}
    assert parameters <= encoder | decoder
    assert parameters & encoder & decoder == {"shared.weight"}
    crossed = {f"decoder.block.{i}.layer.1.EncDecAttention.{part}.weight" for i in range(1) for part in "kv"}
    assert crossed <= encoder


@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_families(case: Case, tmp_path: Path) -> None:
    model = case.model()
    report = ps.export_onnx(model, out=tmp_path / "onnx", check_placement="cuda")
    assert report.facts["parity"]["max_abs_diff"] <= 1e-4
    expected = transformers_writes(model)
    assert we_write(tmp_path / "onnx") == expected
    assert len({tuple(row) for row in expected}) > 1, "texts that tell one source from another"


@pytest.mark.parametrize(
    ("case", "method"),
    [*((SMALL_T5, method) for method in METHODS), (SMALL_BART, "merged"), (SMALL_BART, "prompt")],
    ids=str,
)
def test_methods(case: Case, method: str, tmp_path: Path) -> None:
    model = case.model()
    adapter, plain, written = trained(model, method), logits(model), transformers_writes(model)
    words = {**METHODS[method][2], "check_placement": "cuda"}
    report = ps.export_onnx(model, adapters=adapter, out=tmp_path / "onnx", **words)
    assert report.facts["parity"]["max_abs_diff"] <= 1e-4
    expected = logits(ps.inject(model, adapter))
    run = pair(tmp_path / "onnx")
    feeds = {name: tensor.numpy() for name, tensor in texts().items()}
    found = run({**feeds, "decoder_input_ids": feeds["input_ids"][:, :4]})["logits"]
    assert np.abs(found - expected).max() <= 1e-4 < 1e-2 < np.abs(expected - plain).max()
    assert we_write(tmp_path / "onnx") == transformers_writes(model) != written


def test_a_prefix_never_leaves_the_decoder(tmp_path: Path) -> None:
    model = SMALL_BART.model()
    report = ps.export_onnx(model, adapters=trained(model, "prefix"), out=tmp_path / "onnx")
    assert report.facts["parity"]["max_abs_diff"] <= 1e-4
    graph = onnx.load(tmp_path / "onnx" / DECODER).graph
    assert {f"prefix.{i}.{part}" for i in range(2) for part in ("key", "value")} <= {
        t.name for t in graph.initializer
    }
    run = pair(tmp_path / "onnx")
    _, state = run.write(
        run.read({name: tensor.numpy() for name, tensor in texts().items()}), np.full((2, 3), 7)
    )
    assert state["past_key_values.0.decoder.key"].numpy().shape == (2, 4, 3, 8)


def test_directories_on_the_command_line(tmp_path: Path) -> None:
    model, source, out = SMALL_T5.model(), tmp_path / "t5", tmp_path / "onnx"
    model.save_pretrained(source)
    adapter = ps.save_adapter(trained(model, "factored"), tmp_path / "adapter")
    words = [str(source), "--adapter", str(adapter), "-o", str(out), "--json"]
    done = CliRunner().invoke(main, ["export-onnx", *words])
    assert done.exit_code == 0, done.output
    assert json.loads((out / "peftsurgery.json").read_text())["parity"] == json.loads(done.stdout)["parity"]
    assert {file.name for file in out.glob("*.onnx")} == {ENCODER, DECODER}
    again = ["verify", str(out), "--against", str(source)]
    assert CliRunner().invoke(main, [*again, "--adapter", str(adapter)]).exit_code == 0
    assert CliRunner().invoke(main, again).exit_code == 1


def test_beside_the_checkpoint(tmp_path: Path) -> None:
    SMALL_T5.model().save_pretrained(tmp_path)
    before = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    report = ps.export_onnx(tmp_path, out=tmp_path, weights="reference")
    assert report.facts["parity"]["max_abs_diff"] <= 1e-4
    after = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert set(after) - set(before) == {ENCODER, DECODER, "peftsurgery.json"}
    assert before.items() <= after.items()


def test_the_signature_of_the_whole_speaks_of_virtual_tokens() -> None:
    model = SMALL_T5.model()
    ps.inject(model, trained(model, "prompt"))
    hidden, scores = signature(model).outputs
    assert hidden.axes == ("batch_size", "sequence_length + 5", 32)
    assert scores.axes == ("batch_size", "decoder_sequence_length", 101)


def _ports(ports: Any) -> dict[str, list[str | int]]:
    return {
        port.name: [axis.dim_param or axis.dim_value for axis in port.type.tensor_type.shape.dim]
        for port in ports
    }
