"""Linear maps whose weight lies in a file, and is read there as it is stored: (out, in).

A Transpose of it would make ONNX Runtime write every weight again, in memory, whenever it loads the graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftsurgery.graph.passes import swaps

if TYPE_CHECKING:
    import onnx_ir as ir

CONTRIB = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""


def read_as_stored(model: ir.Model, *, portable: bool = False) -> None:
    """`MatMul(x, Transpose(W))` of a W in a file becomes an operator that reads W as it is.

    `FusedMatMul(x, W, transB=1)`, an operator of ONNX Runtime alone, takes an x of any rank. ONNX's own Gemm takes
    matrices: `portable`, x is reshaped to one, and what comes out is reshaped back, with the bias added on the way.
    """
    import onnx_ir as ir
    from onnx_ir.passes import common

    for value in list(model.graph.initializers.values()):
        if isinstance(value.const_value, ir.ExternalTensor):
            for node in [node for node, _ in value.uses() if swaps(node)]:
                _replace(model, value, node, portable)
    if portable:
        common.CommonSubexpressionEliminationPass()(model)  # maps of one x share its shape


def _replace(model: ir.Model, weight: ir.Value, transpose: ir.Node, portable: bool) -> None:
    turned = transpose.outputs[0]
    for node, index in list(turned.uses()):
        if node.op_type == "MatMul" and index == 1 and not node.domain:
            (_gemm if portable else _fused)(model, node, weight)
    if not turned.uses() and not turned.is_graph_output():
        model.graph.remove(transpose, safe=True)


def _fused(model: ir.Model, matmul: ir.Node, weight: ir.Value) -> None:
    import onnx_ir as ir

    inputs = [matmul.inputs[0], weight]
    fused = ir.node("FusedMatMul", inputs, {"transB": 1}, domain=CONTRIB, name=matmul.name)
    model.graph.opset_imports[CONTRIB] = 1
    _put(model, [fused], [matmul])


def _gemm(model: ir.Model, matmul: ir.Node, weight: ir.Value) -> None:
    """Of a last node that adds a bias to the product the output, and otherwise of the product."""
    import onnx_ir as ir

    assert weight.shape is not None
    (width, depth), x, add = weight.shape.numpy(), matmul.inputs[0], _bias(matmul)
    bias = [] if add is None else [value for value in add.inputs if value is not matmul.outputs[0]]
    flat = ir.node("Reshape", [x, _constant(model, -1, depth)])
    gemm = ir.node("Gemm", [flat.outputs[0], weight, *bias], {"transB": 1}, name=matmul.name)
    leading = ir.node("Shape", [x], {"end": -1})
    shape = ir.node("Concat", [leading.outputs[0], _constant(model, width)], {"axis": 0})
    back = ir.node("Reshape", [gemm.outputs[0], shape.outputs[0]])
    _put(model, [flat, gemm, leading, shape, back], [matmul] if add is None else [add, matmul])


def _bias(matmul: ir.Node) -> ir.Node | None:
    """The node that adds a vector of the model to the product, where nothing else reads the product."""
    product = matmul.outputs[0]
    users = [node for node, _ in product.uses()]
    if len(users) != 1 or users[0].op_type != "Add" or product.is_graph_output():
        return None
    other = next((value for value in users[0].inputs if value is not product), None)
    held = None if other is None else other.const_value
    return users[0] if held is not None and held.shape.rank() == 1 else None


def _constant(model: ir.Model, *numbers: int) -> ir.Value:
    """The initializer with these dimensions, which all that need them share."""
    import numpy as np
    import onnx_ir as ir

    name = f"shape.{'x'.join(map(str, numbers))}"
    if name not in model.graph.initializers:
        tensor = ir.tensor(np.array(numbers, np.int64), name=name)
        value = ir.Value(name=name, shape=ir.Shape([len(numbers)]), type=ir.TensorType(tensor.dtype))
        value.const_value = tensor
        model.graph.register_initializer(value)
    return model.graph.initializers[name]


def _put(model: ir.Model, new: list[ir.Node], old: list[ir.Node]) -> None:
    """Let the last of the `new` nodes give what the first of the `old` ones gave."""
    import onnx_ir as ir

    gone, made = old[0].outputs[0], new[-1].outputs[0]
    made.name, made.shape, made.type = gone.name, gone.shape, gone.type
    model.graph.insert_before(old[0], new)
    ir.convenience.replace_all_uses_with(gone, made, replace_graph_outputs=True)
    model.graph.remove(old, safe=True)
