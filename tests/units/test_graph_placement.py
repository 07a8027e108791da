"""Where nodes would run on a CUDA machine, by the registry of ONNX Runtime's kernels."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from peftsurgery.commands.placement import placement
from peftsurgery.errors import PlacementError
from peftsurgery.graph.placement import placed
from tests.units.graphs import graph, node, noise


def contrib(op: str, inputs: str, output: str, **attributes: object) -> ir.Model:
    made = graph(
        [
            node("Neg", "x", "n"),
            helper.make_node(op, inputs.split(), [output], domain="com.microsoft", **attributes),
        ],
        {"w": noise(4, 4)},
    )
    made.graph.opset_imports["com.microsoft"] = 1
    return made


def test_what_computes_has_a_kernel_and_shapes_stay_on_the_cpu() -> None:
    model = graph(
        [
            node("Shape", "x", "shape"),
            node("Gather", "shape zero", "rows"),
            node("Unsqueeze", "rows axis", "one"),
            node("Concat", "one four", "wide", axis=0),
            node("Expand", "bias wide", "b"),
            node("Add", "x b", "y"),
        ],
        {
            "zero": np.array(0),
            "axis": np.int64([0]),
            "four": np.int64([4]),
            "bias": noise(4),
        },
    )
    found = placed(model)
    assert (found.device, found.shapes, found.copies, found.lost) == (3, 3, 0, ())
    assert "onnxruntime 1.31.1" in str(found)


def test_a_shape_that_is_computed_with_is_copied() -> None:
    model = graph(
        [
            node("Shape", "x", "shape"),
            node("Gather", "shape ids", "z"),
            node("Cast", "z", "c", to=1),
            node("Mul", "c x", "y"),
        ],
        {},
    )
    assert placed(model).copies == 1


def test_an_operation_without_a_kernel_is_named_with_its_types() -> None:
    model = graph([node("Neg", "x", "n"), node("Det", "n", "y")], {})
    (lost,) = placed(model).lost
    assert (lost.op, lost.name) == ("Det", "Det_y") and "(float)" in lost.types
    with pytest.raises(PlacementError, match=r"1 nodes.*Det.*nothing was written") as caught:
        placement({"model.onnx": model})
    assert "Det_y" in str(caught.value.report)


@pytest.mark.parametrize(
    ("dtype", "kernels"), [(TensorProto.FLOAT, 0), (TensorProto.FLOAT16, 1), (TensorProto.BFLOAT16, 1)]
)
def test_a_kernel_is_there_for_some_types_alone(dtype: int, kernels: int) -> None:
    """GroupQueryAttention has no float32 kernel, and the types follow through a Cast."""
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=dtype),
        helper.make_node(
            "GroupQueryAttention",
            ["h", "h", "h", "", "", "lengths", "total"],
            ["y", "k", "v"],
            name="gqa",
            domain="com.microsoft",
            num_heads=2,
            kv_num_heads=2,
        ),
    ]
    weights = {"lengths": np.int32([1, 1]), "total": np.int32([1])}
    model = graph(nodes, weights)
    model.graph.opset_imports["com.microsoft"] = 1
    assert len(placed(model).lost) == 1 - kernels


def test_contrib_operations_give_the_type_that_they_take() -> None:
    made = contrib("FusedMatMul", "n w", "y", transB=1)
    assert placed(made).lost == ()
