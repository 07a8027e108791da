"""Half precision: near torch in float32 from the same rounded weights, and finite where a row sees nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx_ir.tensor_adapters import to_torch_dtype
from torch import nn
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

import peftsurgery as ps
from peftsurgery.graph import parity, seq2seq, weights
from peftsurgery.graph.export import trace
from peftsurgery.graph.session import Session
from peftsurgery.graph.signature import signature
from peftsurgery.live.precision import coarsest, convert, exact
from tests.cli.conftest import adapter_for
from tests.reference.test_export_decoders import CASES, SIZES
from tests.reference.test_export_seq2seq import GATED, SMALL_BART, Case, texts
from tests.subjects import transformer

BERT = BertConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=99
)
HALVES = [
    ("LlamaForCausalLM", torch.float16),
    ("BloomForCausalLM", torch.float16),
    ("GPT2LMHeadModel", torch.bfloat16),
]


def made(name: str, **changes: object) -> nn.Module:
    return transformer(name, {**SIZES, **CASES[name], **changes}, spread=0.1)


def saved(model: nn.Module, directory: Path) -> Session:
    weights.save(trace(model, signature(model)), directory)
    return Session(directory / "model.onnx", ["cpu"], threads=1)


@pytest.mark.parametrize(("name", "dtype"), HALVES, ids=str)
def test_a_half_is_near_float32_from_the_same_weights(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = made(name)
    convert(model, dtype)
    said, session = signature(model), saved(model, tmp_path)
    assert {port.dtype for port in said.outputs} == {str(dtype).removeprefix("torch.")}
    assert session.widened == (dtype is torch.bfloat16)
    near(session, model, dtype)
    assert coarsest(model) is dtype


def near(runner: Session, model: nn.Module, dtype: torch.dtype) -> None:
    """Within two steps of the dtype of the same rounded weights in float32; not equal, for it is a half."""
    said = signature(model)
    with exact(model):
        reference = parity.torch_runner(model, signature(model))
        accepted = parity.tolerance(dtype, widened=runner.widened)
        found = parity.check(parity.compare(runner, reference, said, accepted=accepted))
    assert 0 < found.max_abs_diff / found.worst.scale < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize(("name", "opset"), [("LlamaForCausalLM", 20), ("BloomForCausalLM", 24)], ids=str)
def test_a_softmax_is_in_float32(name: str, opset: int) -> None:
    """Of heads that share keys and values in opset 20, and of scores that no Attention knows."""
    model = made(name, num_hidden_layers=1)
    convert(model, torch.float16)
    (node,) = (n for n in trace(model, signature(model), opset=opset).graph if n.op_type == "Softmax")
    ((after, _),) = node.outputs[0].uses()
    assert cast_to(node.inputs[0].producer()) is torch.float32 and cast_to(after) is torch.float16


def cast_to(node: ir.Node) -> torch.dtype:
    assert node.op_type == "Cast"
    return to_torch_dtype(ir.DataType(node.attributes["to"].as_int()))


@pytest.mark.parametrize("subject", [SMALL_BART, GATED], ids=str)
def test_encoder_decoders_that_clamp_themselves_export_in_float16(subject: Case, tmp_path: Path) -> None:
    """From the checkpoint alone, where no value is there to be asked for."""
    model = subject.model()
    convert(model, torch.float16)
    model.save_pretrained(tmp_path / "base")
    words = {"weights": "reference", "target": "cuda", "check_placement": "cuda"}
    report = ps.export_onnx(tmp_path / "base", out=tmp_path / "onnx", **words)
    assert report.facts["parity"]["accepted"]["why"] == "8 steps of float16"


def test_what_overflows_is_clamped_as_torch_does(tmp_path: Path) -> None:
    model = SMALL_BART.model()
    with torch.no_grad():
        model.model.encoder.layers[-1].final_layer_norm.weight.fill_(60000)
    convert(model, torch.float16)
    half, feeds = seq2seq.halves(model, signature(model))[0], texts()
    weights.save(trace(half.module, half.signature, run=seq2seq.run), tmp_path)
    encoder = Session(tmp_path / "model.onnx", ["cpu"])
    with torch.no_grad():
        expected = model.model.encoder(**feeds).last_hidden_state.numpy()
    found = encoder({name: tensor.numpy() for name, tensor in feeds.items()})["last_hidden_state"]
    assert expected.max() == found.max() == 64504 and np.isfinite(found).all()


def test_a_row_that_sees_nothing_is_finite_in_float16(tmp_path: Path) -> None:
    """Scores below -16 at padding, where the least float16 as a mask would overflow and its NaN reach every token."""
    model = made("LlamaForCausalLM", num_hidden_layers=2)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(60)
            layer.self_attn.k_proj.weight.copy_(-layer.self_attn.q_proj.weight[:16])
    convert(model, torch.float16)
    session = saved(model, tmp_path)
    mask = np.array([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
    ids = np.array([[0, 0, 0, 7, 8], [3, 4, 5, 7, 8]])
    past = {name: np.zeros((2, 2, 0, 8)) for name in session.past_ports()}
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    found = session({"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past})
    assert all(np.isfinite(output).all() for output in found.values())
    least = [t for t in onnx.load(tmp_path / "model.onnx").graph.initializer if t.data_type == 10]
    assert all(
        np.isfinite(array := onnx.numpy_helper.to_array(t)).all() and array.min() > -65504 for t in least
    )


def test_what_is_merged_is_rounded_once(tmp_path: Path) -> None:
    BertModel(BERT).save_pretrained(tmp_path / "bert")
    model = BertModel.from_pretrained(tmp_path / "bert")
    adapter = adapter_for(model, "query", tmp_path / "adapter")
    words = {"dtype": "float16", "task": "feature-extraction", "check_placement": "cuda"}
    report = ps.export_onnx(tmp_path / "bert", adapters=adapter, out=tmp_path / "onnx", **words)
    ps.merge(model, ps.load_adapter(adapter))
    expected = dict(model.named_parameters())
    graph = weights.load(tmp_path / "onnx" / "model.onnx").graph
    name = "encoder.layer.1.attention.self.query.weight"
    stored = graph.initializers[name].const_value.numpy()
    assert np.array_equal(stored.T, expected[name].detach().half().numpy())
    assert report.facts["parity"]["accepted"]["why"] == "8 steps of float16"


def test_a_live_model_keeps_its_dtype_and_its_ties(tmp_path: Path) -> None:
    model = made("GPT2LMHeadModel")
    before = dict(model.named_parameters(remove_duplicate=False))
    ps.export_onnx(model, dtype="bfloat16", out=tmp_path / "onnx", verify=False)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is parameter for name, parameter in before.items())
    assert model.transformer.wte.weight is model.lm_head.weight
    assert '"dtype": "bfloat16"' in (tmp_path / "onnx" / "config.json").read_text()


def test_t5_keeps_what_overflows_in_float32() -> None:
    config = T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=40)
    model = T5ForConditionalGeneration(config)
    convert(model, torch.float16)
    kept = {name for name, p in model.named_parameters() if p.dtype is torch.float32}
    assert kept and all(".wo." in name for name in kept)
