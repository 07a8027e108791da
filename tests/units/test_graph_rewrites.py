"""Rewrites: what the exporter spells out is gone, what only looks like it stays, and both compute the same."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from peftsurgery.graph import parity, rewrites, weights
from peftsurgery.graph.export import trace
from peftsurgery.graph.session import Session
from peftsurgery.graph.signature import signature
from tests.subjects import transformer
from tests.units.graphs import bert, node

LLAMA = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 101,
    "max_position_embeddings": 96,
}
SPELT_OUT = {"Expand", "GatherND", "Neg", "Reciprocal", "Max", "GreaterOrEqual"}


def counted(model: ir.Model) -> Counter[str]:
    return Counter(n.op_type for n in model.graph)


@pytest.mark.parametrize("opset", [20, 24])
def test_a_decoder_is_lean_and_the_same(opset: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    model = transformer("LlamaForCausalLM", LLAMA, spread=0.1)
    said = signature(model)
    graph = trace(model, said, opset=opset)
    ops = counted(graph)
    assert not SPELT_OUT & set(ops)
    assert ops["Split"] == 4, "queries and keys are rotated in each of two layers"
    assert ops["Attention"] == (2 if opset == 24 else 0)
    shapes = [n.inputs[1] for n in graph.graph if n.op_type == "Reshape"]
    assert all(ir.convenience.get_const_tensor(shape) is not None for shape in shapes)
    directory = tmp_path_factory.mktemp("lean")
    weights.save(graph, directory)
    found = parity.compare(Session(directory / "model.onnx"), parity.torch_runner(model, said), said)
    assert parity.check(found).max_abs_diff < 1e-5


def test_a_padding_mask_is_read_as_it_is() -> None:
    model = bert().eval()
    ops = counted(trace(model, signature(model), opset=20))
    assert not SPELT_OUT & set(ops)
    assert (ops["And"], ops["Range"], ops["Where"]) == (0, 0, 1), "the same for every query"
    fused = counted(trace(model, signature(model)))
    assert fused["Attention"] == 1 and fused["Softmax"] == 0


def made(nodes: list[NodeProto], shapes: dict[str, list[str | int]], **constants: np.ndarray) -> ir.Model:
    """A graph of `x` (batch, 2, length, 4) with the shapes that an exporter knows."""
    known = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in shapes.items()]
    graph = helper.make_graph(
        nodes,
        "made",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2, "length", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shapes.get("y"))],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
        value_info=[value for value in known if value.name != "y"],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


def run(model: ir.Model) -> np.ndarray:
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    x = np.random.default_rng(0).standard_normal((3, 2, 5, 4)).astype(np.float32)
    return session.run(None, {"x": x})[0]


def computed_view(*axes: str) -> list[NodeProto]:
    return [
        node("Shape", "x", "all"),
        node("Gather", "all where", "lengths"),
        node("Concat", " ".join(axes), "to", axis=0),
        node("Reshape", "x to", "y"),
    ]


def test_a_computed_shape_is_said() -> None:
    model = made(
        computed_view("lengths", "eight"),
        {"y": ["batch", 2, "length", 2, 2]},
        where=np.int64([0, 1, 2]),
        eight=np.int64([2, 2]),
    )
    before = run(model)
    rewrites.apply(model)
    (view,) = (n for n in model.graph if n.op_type == "Reshape")
    assert ir.convenience.get_const_tensor(view.inputs[1]).numpy().tolist() == [0, 2, 0, 2, 2]
    assert np.array_equal(run(model), before)


def test_two_axes_that_nobody_knows_stay_computed() -> None:
    model = made(
        computed_view("lengths", "eight"),
        {"y": ["length", "batch", 8]},
        where=np.int64([2, 0]),
        eight=np.int64([8]),
    )
    before = run(model)
    rewrites.apply(model)
    assert counted(model)["Shape"] == 1
    assert np.array_equal(run(model), before)


@pytest.mark.parametrize(("cut", "split"), [(2, 1), (1, 0), (3, 0)])
def test_only_halves_are_rotated(cut: int, split: int) -> None:
    parts = [
        node("Slice", "x cut end last", "upper"),
        node("Slice", "x zero cut last", "lower"),
        node("Neg", "upper", "turned"),
        node("Concat", "turned lower", "both", axis=-1),
        node("Mul", "both sines", "y"),
    ]
    model = made(
        parts,
        {"y": ["batch", 2, "length", 4]},
        cut=np.int64([cut]),
        end=np.int64([2**63 - 1]),
        zero=np.int64([0]),
        last=np.int64([3]),
        sines=np.float32([1, 2, 3, 4]),
    )
    before = run(model)
    rewrites.apply(model)
    assert counted(model)["Split"] == split
    assert np.array_equal(run(model), before)


def test_what_makes_a_tensor_larger_stays() -> None:
    model = made([node("Expand", "x wide", "y")], {"y": [3, 2, "length", 4]}, wide=np.int64([3, 1, 1, 1]))
    rewrites.apply(model)
    assert counted(model)["Expand"] == 1
