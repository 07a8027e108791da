"""Experts in a graph: each multiplies the words that were sent to it, and its matrix alone is taken for that.

transformers sorts the words by expert and multiplies them group by group, an operation that ONNX has not. Here it is a
Loop over the experts. One that no word was sent to costs nothing; of another one the matrix is taken out of the stack
as it is stored, (out, in), so a stack of experts in a file is never written again in memory.
"""

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import INT32, opset18, script
from onnxscript.function_libs.torch_lib.tensor_typing import TFloat
from transformers.integrations import moe

op: Any = opset18


@script()
def grouped(x: TFloat, w: TFloat, ends: INT32) -> TFloat:
    """Of words (S, in), matrices (experts, in, out) and the number of the word behind each group's last (experts,)."""
    stored = op.Transpose(w, perm=[0, 2, 1])  # the model has transposed what is stored, and both go
    stops = op.Cast(ends, to=7)
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    width = op.Shape(stored, start=1, end=2)
    product = op.CastLike(op.Expand(op.Constant(value_float=0.0), op.Concat(zero, width, axis=0)), x)
    start = op.Identity(zero)
    for expert in range(op.Squeeze(op.Shape(stored, start=0, end=1))):
        stop = op.Gather(stops, op.Reshape(expert, one))
        if op.Squeeze(op.Less(start, stop)):
            own = op.Gather(stored, expert)
            more = op.Concat(product, op.Gemm(op.Slice(x, start, stop, zero), own, transB=1), axis=0)
        else:
            more = op.Identity(product)
        product = more
        start = op.Identity(stop)
    return product  # type: ignore[no-any-return]


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What torch's exporter is to write for a product in groups: torch's own, or what transformers has in its place."""
    assert moe.ALL_EXPERTS_FUNCTIONS is not None  # the import is what makes the operation known
    fallback = torch.ops.transformers.grouped_mm_fallback.default
    return {fallback: grouped, torch.ops.aten._grouped_mm.default: grouped}
