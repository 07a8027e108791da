"""What torch's own exporter makes of a model, with the inputs and outputs of ours: something to be compared with."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from peftsurgery.errors import UnsupportedModel, cause
from peftsurgery.graph.export import Flat, free_axes, quiet
from peftsurgery.graph.inputs import as_torch, sample
from peftsurgery.graph.posture import evaluating
from peftsurgery.graph.signature import Signature


def export(model: nn.Module, said: Signature, path: Path, *, opset: int | None = None) -> None:
    """Write `torch.onnx.export(dynamo=True)` of the model as it is, with torch's own optimisation.

    Args:
        opset: torch's own by default.

    Raises:
        UnsupportedModel: torch cannot.
    """
    flat = Flat(model, said, {})
    with evaluating(flat), quiet():
        try:
            torch.onnx.export(
                flat,
                tuple(as_torch(sample(said), said, next(model.parameters()).device).values()),
                path,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                dynamic_shapes={"tensors": tuple(free_axes(port) for port in said.inputs)},
                input_names=[port.name for port in said.inputs],
                output_names=[port.name for port in said.outputs],
            )
        except Exception as error:  # dynamo's, torch.export's and the model's own share no base
            raise UnsupportedModel(
                f"torch.onnx.export refuses {type(model).__name__}: {cause(error)}. It is left out of the comparison."
            ) from error
