"""Virtual tokens in a graph: evaluated as far as they depend on nothing, and named for what they are."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peftsurgery.graph.passes import as_torch

if TYPE_CHECKING:
    import onnx_ir as ir


def bake(model: ir.Model, tables: Collection[str], tokens: Mapping[str, Tensor]) -> None:
    """Fold what is computed from `tables` alone, and name what is left of it by `tokens`.

    A prefix table (n, 2·layers·width) becomes one initializer for each layer's keys and one for its
    values, so that nothing of it is computed at run time and each has a name to be found by.

    Args:
        tables: initializers that hold virtual tokens.
        tokens: the name of each evaluated part → its value, in the layout (heads, n, head_dim) or (n, width).
    """
    if not tables:
        return
    before = set(model.graph.initializers)
    _fold(model, tables)
    for value in [value for name, value in model.graph.initializers.items() if name not in before]:
        # Parts may be equal: a layer that runs twice takes the same one twice, and a fresh prefix may be all zeros.
        free = {name: part for name, part in tokens.items() if name not in model.graph.initializers}
        _name(value, free)


def _fold(model: ir.Model, tables: Collection[str]) -> None:
    from onnxscript import optimizer

    known = set(tables)

    def foldable(node: ir.Node) -> bool:
        inputs = [value for value in node.inputs if value is not None]
        constant = all(value.name in known or value.const_value is not None for value in inputs)
        if not constant or not any(value.name in known for value in inputs):
            return False
        known.update(value.name for value in node.outputs if value.name is not None)
        return True

    optimizer.fold_constants(model, should_fold=foldable, input_size_limit=1 << 40, output_size_limit=1 << 40)


def _name(value: ir.Value, tokens: Mapping[str, Tensor]) -> None:
    if value.const_value is None:
        return
    held = as_torch(value.const_value)
    for name, expected in tokens.items():
        for seen in (expected, expected.transpose(0, 1)):
            if held.numel() == seen.numel() and torch.equal(
                held.reshape(-1), seen.reshape(-1).to(held.dtype)
            ):
                value.name = name
                return
