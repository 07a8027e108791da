"""The layers of a model, and what each of them gives: watched in torch, remembered by name in a graph.

A layer is a module in one of the model's outermost lists of modules (`model.layers`, `encoder.block`), whatever the
architecture. What enters the first of a list counts too, for the embeddings are in no list.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from peftsurgery.graph.signature import RECORDED

if TYPE_CHECKING:
    import onnx_ir as ir

Layers = Mapping[str, nn.Module]
BEFORE, ENTRY = "before ", ".input"
"""How a layer's input is called, and how its value in a graph is."""
TOLD = "layer "
"""What the names of a watched model's further outputs begin with."""
KEY = f"{RECORDED}layers"
"""Where a graph keeps which values are its layers' outputs."""


def of(model: nn.Module, part: nn.Module | None = None) -> dict[str, nn.Module]:
    """The layers by name, in the model's order.

    Args:
        part: only those inside of it.
    """
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    inside = set((model if part is None else part).modules())
    return {
        f"{name}.{index}": layer
        for name in outermost
        for index, layer in model.get_submodule(name).named_children()
        if layer in inside
    }


@contextmanager
def watched(layers: Layers) -> Iterator[dict[str, Tensor]]:
    """What the layers give while the context lasts, by name, in the order of their calls.

    What enters the first of a list is `before <layer>`; the second call of one layer is `<layer>:2`.
    """
    seen: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name, layer in layers.items():
            if name.endswith(".0"):
                entered = layer.register_forward_pre_hook(_entering(seen, name), with_kwargs=True)
                hooks.callback(entered.remove)
            hooks.callback(layer.register_forward_hook(_leaving(seen, name)).remove)
        yield seen


def _entering(seen: dict[str, Tensor], name: str) -> Callable[..., None]:
    def note(module: nn.Module, args: tuple[Any, ...], words: Mapping[str, Any]) -> None:
        hidden = _hidden([*args, *words.values()])
        if hidden is not None and name not in seen:
            seen[BEFORE + name] = hidden

    return note


def _leaving(seen: dict[str, Tensor], name: str) -> Callable[..., None]:
    def note(module: nn.Module, args: tuple[Any, ...], given: Any) -> None:
        hidden = _hidden(given if isinstance(given, tuple | list) else [given])
        if hidden is not None:
            again = 1 + sum(word.partition(":")[0] == name for word in seen)
            seen[name if again == 1 else f"{name}:{again}"] = hidden

    return note


def _hidden(given: Any) -> Tensor | None:
    """The first of several values that can be hidden states: numbers, (batch, tokens, width)."""
    found = (value for value in given if isinstance(value, Tensor) and value.is_floating_point())
    return next((value for value in found if value.ndim >= 3), None)


def telling(run: Callable[..., Mapping[str, Any]], seen: dict[str, Tensor]) -> Callable[..., dict[str, Any]]:
    """`run` whose outputs have those of the watched layers behind them."""

    def told(*args: Any) -> dict[str, Any]:
        seen.clear()
        given = dict(run(*args))
        return {**given, **{TOLD + name: tensor for name, tensor in seen.items()}}

    return told


def take_off(graph: ir.Model, count: int, names: list[str]) -> dict[str, str]:
    """Take all outputs but the first `count` off a traced graph; what they are called in it, by their `names`.

    The value gets the name of its layer, unless it is one of the first outputs too.
    """
    values = list(graph.graph.outputs[count:])
    del graph.graph.outputs[count:]
    kept = {id(value) for value in graph.graph.outputs}
    found: dict[str, str] = {}
    for name, value in zip(names, map(_computed, values), strict=True):
        if id(value) not in kept:
            value.name = name.removeprefix(BEFORE) + ENTRY if name.startswith(BEFORE) else name
            kept.add(id(value))
        found[name] = str(value.name)
    return found


def _computed(value: ir.Value) -> ir.Value:
    """The value itself, or what it repeats: a repetition is eliminated, and its name with it."""
    producer = value.producer()
    while producer is not None and producer.op_type == "Identity":
        assert producer.inputs[0] is not None
        value = producer.inputs[0]
        producer = value.producer()
    return value


def record(graph: ir.Model, found: Mapping[str, str]) -> None:
    """Write into the graph which of its values are layers' outputs, of those that it still has."""
    there = {value.name for node in graph.graph for value in node.outputs}
    held = {name: value for name, value in found.items() if value in there}
    if held:
        graph.metadata_props[KEY] = json.dumps(held)


def remembered(file: Path) -> dict[str, str]:
    """By the names of its layers, the values that a graph has for them; none where it was not told."""
    import onnx

    proto = onnx.load(file, load_external_data=False)
    said = {prop.key: prop.value for prop in proto.metadata_props}.get(KEY)
    there = {name for node in proto.graph.node for name in node.output}
    found: dict[str, str] = json.loads(said) if said else {}
    return {name: value for name, value in found.items() if value in there}


def revealed(graph: bytes, values: Sequence[str]) -> bytes:
    """A serialised graph that gives these of its values too; weights outside of it stay where they are."""
    import onnx

    proto = onnx.load_from_string(graph)
    given = {port.name for port in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in values if name not in given)
    made: bytes = proto.SerializeToString()
    return made
