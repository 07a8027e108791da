"""Leaner graphs that say the same, with every parameter under its name."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch

from peftsurgery.graph import passes
from tests.units.graphs import graph, node, noise


def run(model: ir.Model) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": noise(5, 4), "ids": np.array([0, 2, 1, 2, 0])})


def ops(model: ir.Model) -> list[str]:
    return [n.op_type for n in model.graph]


def test_a_matrix_that_matmul_reads_transposed_is_stored_so() -> None:
    weight = noise(3, 4)
    model = graph(
        [node("Transpose", "a.weight", "t", perm=[1, 0]), node("MatMul", "x t", "y")], {"a.weight": weight}
    )
    before = run(model)
    passes.store_transposed(model)
    assert ops(model) == ["MatMul"]
    value = model.graph.initializers["a.weight"]
    assert tuple(value.shape) == (4, 3)
    assert value.metadata_props[passes.TURNED]
    assert np.array_equal(value.const_value.numpy(), weight.T)
    assert np.array_equal(run(model)[0], before[0])


def test_a_matrix_that_somebody_else_reads_stays_as_it_is() -> None:
    model = graph(
        [
            node("Gather", "e.weight ids", "rows"),
            node("Transpose", "e.weight", "t", perm=[1, 0]),
            node("MatMul", "rows t", "y"),
        ],
        {"e.weight": noise(3, 4)},
    )
    passes.store_transposed(model)
    assert ops(model) == ["Gather", "Transpose", "MatMul"]
    assert tuple(model.graph.initializers["e.weight"].shape) == (3, 4)


def test_constants_are_folded_and_parameters_are_not() -> None:
    model = graph(
        [
            node("Add", "one two", "three"),
            node("Mul", "p.weight q.weight", "product"),
            node("Identity", "product", "same"),
            node("Mul", "x same", "scaled"),
            node("Mul", "x three", "tripled"),
            node("Mul", "x three", "again"),
            node("Add", "scaled tripled", "sum"),
            node("Add", "sum again", "y"),
            node("Neg", "x", "unused"),
        ],
        {
            "one": np.float32([1]),
            "two": np.float32([2]),
            "p.weight": noise(4),
            "q.weight": noise(4),
            "unread.weight": noise(4),
        },
    )
    before = run(model)
    passes.lean(model, {"p.weight", "q.weight"})
    assert sorted(ops(model)) == ["Add", "Add", "Mul", "Mul", "Mul"]
    assert {"p.weight", "q.weight"} < set(model.graph.initializers)
    assert "unread.weight" not in model.graph.initializers
    assert np.allclose(run(model)[0], before[0])
    assert all(n.outputs[0].shape is None for n in model.graph if not n.outputs[0].is_graph_output())


def test_tensors_pass_between_torch_and_a_graph_bit_for_bit() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool):
        tensor = (torch.randn(3, 5) * 4).to(dtype)
        there = passes.as_ir(tensor, "w")
        stored = ir.serde.deserialize_tensor(ir.serde.serialize_tensor(there))
        for back in (passes.as_torch(there), passes.as_torch(stored)):
            assert back.dtype is dtype
            assert torch.equal(back, tensor)
