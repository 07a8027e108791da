"""Tracing: a live model becomes a lean graph whose initializers bear its parameters' names."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftsurgery.errors import ExportError, UnsupportedModel, cause
from peftsurgery.graph import cache, layers, linear, passes, precision, reference, sites, virtual
from peftsurgery.graph.inputs import as_torch, sample
from peftsurgery.graph.posture import blind, eager
from peftsurgery.graph.reference import Held
from peftsurgery.graph.signature import RECORDED, Port, Signature, call

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 24
"""The first one whose Attention, RMSNormalization and RotaryEmbedding ONNX Runtime runs on CPUs and on CUDA."""
PREFIX = "wrapped."
Run = Callable[[nn.Module, Mapping[str, Tensor]], Mapping[str, Any]]
"""From a model and its inputs by name to its outputs by name."""


class Flat(nn.Module):
    """A model that takes and gives plain tensors, in the signature's order, behind its constant prefix.

    `run` calls it by name.
    """

    def __init__(
        self, model: nn.Module, signature: Signature, prefix: Mapping[str, Tensor], run: Run = call
    ) -> None:
        super().__init__()
        self.wrapped = model
        self.signature = signature
        self.run = run
        layers = range(len(prefix) // 2)
        self.prefix = nn.ModuleList(
            cache.Constant(prefix[f"prefix.{i}.key"], prefix[f"prefix.{i}.value"]) for i in layers
        )

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        names = (port.name for port in self.signature.inputs)
        prefix = {f"prefix.{name}": tensor for name, tensor in self.prefix.named_buffers()}
        feeds = cache.behind(prefix, dict(zip(names, tensors, strict=True)))
        given = cache.beyond(prefix, self.run(self.wrapped, feeds))
        told = (tensor for name, tensor in given.items() if name.startswith(layers.TOLD))
        return (*(given[port.name] for port in self.signature.outputs), *told)


def trace(
    model: nn.Module,
    signature: Signature,
    *,
    names: Callable[[str], str] = str,
    opset: int = OPSET,
    tables: Collection[str] = (),
    tokens: Mapping[str, Tensor] | None = None,
    held: Mapping[str, Held] | None = None,
    prefix: Mapping[str, Tensor] | None = None,
    run: Run = call,
    watch: layers.Layers | None = None,
    portable: bool = False,
    fuse: bool = False,
) -> ir.Model:
    """The model as an ONNX graph, dynamic in batch and length; the model is left as it was.

    An initializer has the name that `names` makes of its parameter's. A matrix that only a MatMul
    reads is stored (in, out), a view of the parameter; a tied one stays one tensor. The graph refers
    to the model's memory until it is saved.

    Args:
        names: from a parameter's name in `model` to the initializer's.
        tables: initializers that hold virtual tokens and are evaluated as far as they go.
        tokens: what to call the evaluated parts → their values (see `virtual.bake`).
        opset: version of the ONNX operators.
        prefix: constant keys and values that a decoder reads first (see `cache.behind`); initializers of these names.
        held: where the initializers lie whose parameters have no bytes, and stay, (out, in); or what gives them later.
        run: from the model and its inputs by name to its outputs by name.
        watch: the layers by name whose outputs the graph remembers, so that `verify` can look at them.
        portable: read weights in files with operators of ONNX alone.
        fuse: norms, rotations and attention as ONNX's own operators for them; takes opset 24.

    Raises:
        UnsupportedModel: torch cannot trace it.
        ExportError: the traced graph reads no attention mask, or gives two parameters one name.
    """
    with layers.watched(watch or {}) as seen:
        flat = Flat(model, signature, prefix or {}, layers.telling(run, seen))
        with blind(flat), eager(model), quiet():
            graph = _traced(flat, signature, opset)
    remembered = layers.take_off(graph, len(signature.outputs), [*seen])
    parameters = _rename(graph, model, names)
    reference.point(graph, held or {})
    passes.lean(
        graph,
        {*parameters, *(prefix or {})},
        bake=partial(virtual.bake, tables=tables, tokens=tokens or {}),
        fuse=fuse,
    )
    linear.read_as_stored(graph, portable=portable)
    precision.finite(graph)
    _dress(graph, signature)
    _record(graph, signature)
    layers.record(graph, remembered)
    sites.alias(graph, parameters)
    return graph


def _traced(flat: Flat, signature: Signature, opset: int) -> ir.Model:
    from peftsurgery.graph import experts

    sample = _sample(flat)
    free = tuple(free_axes(port) for port in signature.inputs)
    try:
        program = torch.onnx.export(
            flat,
            sample,
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=opset,
            dynamic_shapes={"tensors": free},
            input_names=[port.name for port in signature.inputs],
            output_names=[port.name for port in signature.outputs],
            custom_translation_table=experts.translations(),
        )
    except Exception as error:  # dynamo's, torch.export's and the model's own share no base
        raise UnsupportedModel(
            f"torch cannot trace {type(flat.wrapped).__name__} to opset {opset}: {cause(error)}. "
            "Export its architecture's standard variant, or report it with this message."
        ) from error
    assert program is not None
    return program.model


def free_axes(port: Port) -> dict[int, Any]:
    """The axes of an input that may have any length."""
    return {i: torch.export.Dim.DYNAMIC for i, axis in enumerate(port.axes) if isinstance(axis, str)}


def _sample(flat: Flat) -> tuple[Tensor, ...]:
    device = next(flat.parameters()).device
    return tuple(as_torch(sample(flat.signature), flat.signature, device).values())


def _rename(graph: ir.Model, model: nn.Module, names: Callable[[str], str]) -> dict[str, tuple[str, ...]]:
    """Name the parameters that are read; what comes back are their names, each with its others where tied."""
    known, given = _names(model, names), dict[str, tuple[str, ...]]()
    for name, value in list(graph.graph.initializers.items()):
        inside = name.removeprefix(PREFIX)
        if not value.uses():
            del graph.graph.initializers[name]
        elif inside != name:
            first, *others = known.get(inside) or (names(inside),)
            if first in given:
                raise ExportError(
                    f"Two parameters would be named {first!r}. Merge the adapters, or rename one."
                )
            value.name, given[first] = first, tuple(others)
    return given


def _names(model: nn.Module, names: Callable[[str], str]) -> dict[str, tuple[str, ...]]:
    """For each name in the model, all names that its parameter has: an embedding's first, then in order."""
    tables = [place for place, module in model.named_modules() if isinstance(module, nn.Embedding)]
    tables_first = {f"{place}.weight" for place in tables}
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    found = {}
    for group in groups.values():
        ordered = sorted(group, key=lambda name: name not in tables_first)
        found.update(dict.fromkeys(group, tuple(dict.fromkeys(names(name) for name in ordered))))
    return found


def _dress(graph: ir.Model, signature: Signature) -> None:
    """The names of the axes, as the signature says them."""
    import onnx_ir as ir

    found = {value.name: value for value in (*graph.graph.inputs, *graph.graph.outputs)}
    for port in (*signature.inputs, *signature.outputs):
        found[port.name].shape = ir.Shape(port.axes)
    for port in signature.inputs:
        if port.name.endswith("attention_mask") and not found[port.name].uses():
            raise ExportError(
                f"The traced graph ignores {port.name}, so padding would change its answers. "
                "Report the model's class and the version of transformers; nothing was written."
            )


def _record(graph: ir.Model, signature: Signature) -> None:
    from peftsurgery import __version__

    graph.producer_name, graph.producer_version = "peftsurgery", __version__
    facts = {name: value for name, value in asdict(signature).items() if name not in ("inputs", "outputs")}
    graph.metadata_props.clear()
    graph.metadata_props.update({RECORDED + name: str(value) for name, value in facts.items()})


@contextmanager
def quiet() -> Iterator[None]:
    """The exporter's remarks are about torch's own future, and about libraries that nobody needs here."""
    logger = logging.getLogger("torch.onnx")
    level: Any = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
