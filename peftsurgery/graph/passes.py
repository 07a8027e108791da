"""From what the exporter gives to a lean graph, every parameter kept under its name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    import onnx_ir as ir

FOLDED = 1024
"""Elements of the largest constant that folding may write."""
TURNED = "transposed"
"""The note on an initializer that is stored as the transpose of the model's parameter."""


def lean(
    model: ir.Model,
    parameters: Collection[str],
    bake: Callable[[ir.Model], None] | None = None,
    *,
    fuse: bool = False,
) -> None:
    """Fold shape arithmetic, drop what is said twice or unused, and store matrices as MatMul reads them.

    Args:
        parameters: names of initializers that must survive under their names wherever they are used.
        bake: what evaluates virtual tokens, once shapes are folded and before anything is forgotten.
        fuse: let larger operators stand for many, and ONNX Runtime see the shapes that it fuses the rest by.
    """
    from onnx_ir.passes import common
    from onnxscript import optimizer

    from peftsurgery.graph import rewrites

    kept = frozenset(parameters)

    def foldable(node: ir.Node) -> bool | None:
        # None leaves the decision to the pass's own limits.
        return False if any(value is not None and value.name in kept for value in node.inputs) else None

    common.InlinePass()(model)
    with _unread(model):
        optimizer.fold_constants(
            model,
            onnx_shape_inference=True,
            input_size_limit=FOLDED,
            output_size_limit=FOLDED,
            should_fold=foldable,
        )
    if bake is not None:
        bake(model)
    with _unread(model):
        rewrites.apply(model, fuse=fuse)
    _sweep(model)
    forget(model, shapes=not fuse)
    store_transposed(model)


def _sweep(model: ir.Model) -> None:
    """Drop what is said twice, and what nobody reads."""
    import onnx_ir as ir
    from onnx_ir.passes import common

    ir.passes.Sequential(
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.ClearMetadataAndDocStringPass(),
    )(model)


@contextmanager
def _unread(model: ir.Model) -> Iterator[None]:
    """No value that lies in a file: shape inference would open the file for the smallest of them."""
    import onnx_ir as ir

    values, away = model.graph.initializers.values(), (ir.ExternalTensor, ir.LazyTensor)
    held = [(v, v.const_value) for v in values if isinstance(v.const_value, away)]
    for value, _ in held:
        value.const_value = None
    try:
        yield
    finally:
        for value, tensor in held:
            value.const_value = tensor


def forget(model: ir.Model, *, shapes: bool = True) -> None:
    """Drop the notes of the exporter, and the shapes of what lies between inputs and outputs.

    Where ONNX Runtime knows these shapes it fuses Add and LayerNormalization into its
    SkipLayerNormalization, whose CPU kernel takes about five times as long as the two (version 1.31).
    """
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
    for node in model.graph if shapes else ():
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape, value.type = None, None


def store_transposed(model: ir.Model) -> None:
    """`Transpose(W)` of a matrix that nobody else reads becomes W, stored transposed, under its old name.

    What the graph reads in a file stays as it is there; what it will be given is turned then.
    """
    import onnx_ir as ir

    for value in list(model.graph.initializers.values()):
        if isinstance(value.const_value, ir.ExternalTensor):
            continue
        users = [node for node, _ in value.uses()]
        if users and all(swaps(node) for node in users) and not value.is_graph_output():
            _turn(model, value, users)


def swaps(node: ir.Node) -> bool:
    """Whether the node is the transpose of a matrix."""
    perm = node.attributes.get("perm")
    return node.op_type == "Transpose" and perm is not None and list(perm.as_ints()) == [1, 0]


def _turn(model: ir.Model, value: ir.Value, users: list[ir.Node]) -> None:
    import onnx_ir as ir

    assert value.const_value is not None
    value.const_value = turned(value.const_value)
    value.metadata_props[TURNED] = "1"
    value.shape = ir.Shape(value.const_value.shape.numpy())
    for node in users:
        ir.convenience.replace_all_uses_with(node.outputs[0], value, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)


def turned(matrix: ir.TensorProtocol) -> ir.TensorProtocol:
    """The transpose of a matrix, made when it is written where the matrix is."""
    import onnx_ir as ir

    if not isinstance(matrix, ir.LazyTensor):
        return as_ir(as_torch(matrix).t(), matrix.name)
    shape = ir.Shape(reversed(matrix.shape.numpy()))
    return ir.LazyTensor(
        lambda: as_ir(as_torch(matrix).t(), matrix.name), matrix.dtype, shape, name=matrix.name
    )


def as_torch(tensor: ir.TensorProtocol) -> Tensor:
    """The tensor as torch sees it; it shares memory where it can, so nobody writes to it."""
    import onnx_ir as ir
    import torch
    from onnx_ir.tensor_adapters import TorchTensor, to_torch_dtype

    if isinstance(tensor, TorchTensor):
        return tensor.raw.detach()
    if isinstance(tensor, ir.LazyTensor):
        return as_torch(tensor.raw())
    if isinstance(tensor, ir.ExternalTensor) and tensor.dtype.itemsize >= 1:
        return _read(tensor)
    array = tensor.numpy()
    if array.dtype.kind not in "fiub" or array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(f"u{array.itemsize}").copy()).view(to_torch_dtype(tensor.dtype))
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _read(tensor: ir.ExternalTensor) -> Tensor:
    """What lies in a file; onnx_ir itself refuses to read a hard link."""
    import numpy as np
    import torch
    from onnx_ir.tensor_adapters import to_torch_dtype

    raw = np.fromfile(tensor.path, np.uint8, tensor.nbytes, offset=tensor.offset or 0)
    return torch.from_numpy(raw).view(to_torch_dtype(tensor.dtype)).reshape(*tensor.shape.numpy())


def as_ir(tensor: Tensor, name: str | None) -> ir.TensorProtocol:
    """The torch tensor as a graph holds it; no byte is copied."""
    from onnx_ir.tensor_adapters import TorchTensor

    return TorchTensor(tensor, name=name)
