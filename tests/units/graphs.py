"""Small graphs written by hand, and a small encoder that was traced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from transformers import BertConfig, BertForTokenClassification

CONFIG = BertConfig(
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    intermediate_size=48,
    vocab_size=101,
    num_labels=3,
    max_position_embeddings=96,
)


def graph(
    nodes: Sequence[NodeProto], weights: Mapping[str, np.ndarray], outputs: Sequence[str] = ("y",)
) -> ir.Model:
    """A model of the inputs `x` (batch, 4) in float32 and `ids` (batch,) in int64."""
    made = helper.make_graph(
        nodes,
        "by_hand",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4]),
            helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch"]),
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return ir.from_proto(model)


def node(op: str, inputs: str, output: str, **attributes: object) -> NodeProto:
    return helper.make_node(op, inputs.split(), [output], name=f"{op}_{output}", **attributes)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def bert(dtype: torch.dtype = torch.float32) -> BertForTokenClassification:
    """Its head reads every token, so that its matrix is stored transposed in a graph."""
    torch.manual_seed(0)
    return BertForTokenClassification(CONFIG).to(dtype)
