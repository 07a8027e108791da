"""What the exporters of others make of a model, with the inputs and outputs of our graph, to run beside it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from peftsurgery.graph import cache, stock
from peftsurgery.graph.export import Flat, quiet
from peftsurgery.graph.inputs import as_torch, sample
from peftsurgery.graph.posture import evaluating
from peftsurgery.graph.signature import Signature

Exporter = Callable[[nn.Module, Signature, Path], Any]


def dynamo(attention: str, opset: int) -> Exporter:
    """`torch.onnx.export(dynamo=True)` with its own optimisation."""

    def export(model: nn.Module, said: Signature, path: Path) -> None:
        with attending(model, attention):
            stock.export(model, said, path, opset=opset)

    return export


def torchscript(model: nn.Module, said: Signature, path: Path) -> None:
    """`torch.onnx.export(dynamo=False)`, which follows one run, with attention written out."""
    ports = (*said.inputs, *said.outputs)
    named = {p.name: {i: axis for i, axis in enumerate(p.axes) if isinstance(axis, str)} for p in ports}
    with attending(model, "eager"):
        torch.onnx.export(
            Flat(model, said, {}),
            tuple(feeds(said).values()),
            path,
            dynamo=False,
            opset_version=17,
            dynamic_axes=named,
            input_names=[port.name for port in said.inputs],
            output_names=[port.name for port in said.outputs],
        )


def transformers(attention: str, fusions: str | None = None) -> Exporter:
    """transformers' own exporter; its ports are given our names afterwards."""

    def export(model: nn.Module, said: Signature, path: Path) -> None:
        from transformers.exporters import OnnxConfig, OnnxExporter

        given: dict[str, Any] = feeds(said)
        own = {name: tensor for name, tensor in given.items() if not cache.is_cached([name])}
        if len(own) < len(given):
            own["past_key_values"] = cache.of(given)
        with attending(model, attention):
            done = OnnxExporter().export(model, own, OnnxConfig(dynamic=True, ort_fusions=fusions))
        rename(done.program.graph, said)
        ir.save(done.program, path)

    return export


def rename(graph: ir.Graph, said: Signature) -> None:
    """Our names for its ports, which come in our order; it calls keys and values otherwise."""
    for values, ports in ((graph.inputs, said.inputs), (graph.outputs, said.outputs)):
        names = [port.name for port in ports]
        rest = iter([name for name in names if name.startswith((cache.PAST, cache.PRESENT))])
        for value in values:
            if value.name not in names:
                value.name = next(rest)


def feeds(said: Signature) -> dict[str, torch.Tensor]:
    return as_torch(sample(said), said)


@contextlib.contextmanager
def attending(model: Any, attention: str) -> Iterator[None]:
    """The model in evaluation, with this implementation of attention, and nothing said."""
    before = model.config._attn_implementation
    model.set_attn_implementation(attention)
    try:
        with evaluating(model), quiet(), silent():
            yield
    finally:
        model.set_attn_implementation(before)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    with open(os.devnull, "w") as hole, contextlib.redirect_stdout(hole), contextlib.redirect_stderr(hole):
        yield


def optimised(path: Path, model_type: str, heads: int, width: int, out: Path) -> None:
    """The graph after `onnxruntime.transformers.optimizer`, all its fusions on."""
    from onnxruntime.transformers import optimizer

    with silent():
        done = optimizer.optimize_model(
            str(path), model_type, num_heads=heads, hidden_size=width, opt_level=0
        )
        done.save_model_to_file(str(out))


EXPORTERS: dict[str, Exporter] = {
    "dynamo eager 20": dynamo("eager", 20),
    "dynamo sdpa 20": dynamo("sdpa", 20),
    "dynamo eager 24": dynamo("eager", 24),
    "dynamo sdpa 24": dynamo("sdpa", 24),
    "transformers sdpa": transformers("sdpa"),
    "transformers eager": transformers("eager"),
    "transformers fused": transformers("sdpa", "cpu"),
    "TorchScript eager 17": torchscript,
}
