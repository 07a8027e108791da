"""What the exporters of others make of a model, with the inputs and outputs of our graph, to run beside it."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from peftsurgery.graph import cache
from peftsurgery.graph.export import Flat
from peftsurgery.graph.inputs import as_torch, sample
from peftsurgery.graph.posture import evaluating
from peftsurgery.graph.signature import Signature

Exporter = Callable[[nn.Module, Signature, Path], Any]


def dynamo(attention: str, opset: int) -> Exporter:
    """`torch.onnx.export(dynamo=True)` with its own optimisation."""

    def export(model: nn.Module, said: Signature, path: Path) -> None:
        with attending(model, attention):
            torch.onnx.export(
                Flat(model, said, {}),
                tuple(feeds(said).values()),
                path,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                dynamic_shapes={
                    "tensors": tuple(free(p.axes, torch.export.Dim.DYNAMIC) for p in said.inputs)
                },
                input_names=[port.name for port in said.inputs],
                output_names=[port.name for port in said.outputs],
            )

    return export


def torchscript(opset: int) -> Exporter:
    """`torch.onnx.export(dynamo=False)`, which follows one run; with attention written out."""

    def export(model: nn.Module, said: Signature, path: Path) -> None:
        ports = (*said.inputs, *said.outputs)
        with attending(model, "eager"):
            torch.onnx.export(
                Flat(model, said, {}),
                tuple(feeds(said).values()),
                path,
                dynamo=False,
                opset_version=opset,
                dynamic_axes={port.name: named(port.axes) for port in ports},
                input_names=[port.name for port in said.inputs],
                output_names=[port.name for port in said.outputs],
            )

    return export


def transformers(attention: str, fusions: str | None) -> Exporter:
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
    """Our names for its ports: they come in our order, but for what stands before the cache."""
    for values, ports in ((graph.inputs, said.inputs), (graph.outputs, said.outputs)):
        names = {port.name for port in ports}
        rest = iter([port.name for port in ports if cached(port.name)])
        for value in values:
            if value.name not in names:
                value.name = next(rest)


def cached(name: str) -> bool:
    return name.startswith((cache.PAST, cache.PRESENT))


def feeds(said: Signature) -> dict[str, torch.Tensor]:
    return as_torch(sample(said), said)


def free(axes: tuple[str | int, ...], word: Any) -> dict[int, Any]:
    return {i: word for i, axis in enumerate(axes) if isinstance(axis, str)}


def named(axes: tuple[str | int, ...]) -> dict[int, str]:
    return {i: axis for i, axis in enumerate(axes) if isinstance(axis, str)}


@contextlib.contextmanager
def attending(model: Any, attention: str) -> Iterator[None]:
    """The model in evaluation, with this implementation of attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation(attention)
    try:
        with evaluating(model), quiet():
            yield
    finally:
        model.set_attn_implementation(before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as hole, contextlib.redirect_stdout(hole):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


EXPORTERS: dict[str, Exporter] = {
    "dynamo, eager, opset 20": dynamo("eager", 20),
    "dynamo, sdpa, opset 20": dynamo("sdpa", 20),
    "dynamo, eager, opset 24": dynamo("eager", 24),
    "dynamo, sdpa, opset 24": dynamo("sdpa", 24),
    "transformers, sdpa": transformers("sdpa", None),
    "transformers, eager": transformers("eager", None),
    "transformers, fused": transformers("sdpa", "cpu"),
    "TorchScript, opset 17": torchscript(17),
}


def optimised(path: Path, model_type: str, heads: int, width: int, out: Path) -> None:
    """The graph after `onnxruntime.transformers.optimizer`, all its fusions on."""
    from onnxruntime.transformers import optimizer

    with quiet():
        done = optimizer.optimize_model(
            str(path), model_type, num_heads=heads, hidden_size=width, opt_level=0
        )
        done.save_model_to_file(str(out))
