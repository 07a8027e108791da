"""The types of everything in a graph, from its inputs and weights alone, by ONNX Runtime's own schemas."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True, slots=True)
class Call:
    """One operation, and the types that it is called with.

    Args:
        since: the opset in which the operation was last changed.
        types: by the names of its types and its inputs, in ONNX Runtime's words: `tensor(float)`.
        gives: the names of its outputs' types.
    """

    node: ir.Node
    domain: str
    op: str
    since: int
    types: Mapping[str, str]
    gives: tuple[str, ...] = ()


def calls(model: ir.Model) -> Iterator[Call]:
    """Every operation of a graph in its order; no weight is read."""
    known: dict[str | None, str] = {}
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        tensor = value.const_value
        dtype = value.dtype if tensor is None else tensor.dtype
        if dtype is not None:
            known[value.name] = word(dtype)
    yield from _calls(model.graph, model.graph.opset_imports, known)


def _calls(body: ir.Graph, opsets: Mapping[str, int], known: dict[str | None, str]) -> Iterator[Call]:
    """Those of a body of a Loop or an If come in front of the Loop or the If."""
    import onnx_ir as ir

    for node in body:
        schema = _schema(node.domain, node.op_type, opsets.get(node.domain, 1))
        types = _typed(node, schema, known)
        attributes = node.attributes.values()
        for inner in [a.as_graph() for a in attributes if a.type == ir.AttributeType.GRAPH]:
            yield from _calls(_entered(node, inner, known), opsets, known)
            _left(node, inner, known)
        since = 1 if schema is None else schema.since_version
        gives = () if schema is None else tuple(f.typeStr for _, f in _paired(node.outputs, schema.outputs))
        yield Call(node, node.domain, node.op_type, since, types, gives)


def _entered(node: ir.Node, body: ir.Graph, known: dict[str | None, str]) -> ir.Graph:
    """The body, when what a Loop hands to it is known: its number, whether to go on, and what is carried along."""
    carried = [known.get(value.name) for value in node.inputs[2:] if value is not None]
    for value, kind in zip(body.inputs, ["tensor(int64)", "tensor(bool)", *carried], strict=False):
        if kind is not None:
            known[value.name] = kind
    return body


def _left(node: ir.Node, body: ir.Graph, known: dict[str | None, str]) -> None:
    """What a body gives, its last outputs, is of the type that the node gives."""
    for value, given in zip(node.outputs, body.outputs[len(body.outputs) - len(node.outputs) :], strict=True):
        if given.name in known:
            known[value.name] = known[given.name]


def word(dtype: ir.DataType) -> str:
    """`tensor(float16)`."""
    return f"tensor({dtype.name.lower()})"


def _typed(node: ir.Node, schema: Any, known: dict[str | None, str]) -> dict[str, str]:
    """The types of one operation; those of its outputs become known."""
    if schema is None:
        return {}
    bound: dict[str, str] = {}
    for value, formal in _paired(node.inputs, schema.inputs):
        if value is not None and value.name in known:
            bound.setdefault(formal.typeStr, known[value.name])
            bound[formal.name] = known[value.name]
    for value, formal in _paired(node.outputs, schema.outputs):
        found = bound.get(formal.typeStr) or _said(node, formal.typeStr, schema)
        if found:
            bound.setdefault(formal.typeStr, found)
            known[value.name] = found
    return bound


def _paired(values: Any, formals: Any) -> Iterator[tuple[Any, Any]]:
    """Each value with what the schema calls it; the last one may stand for many."""
    for index, value in enumerate(values):
        if formals:
            yield value, formals[min(index, len(formals) - 1)]


def _said(node: ir.Node, formal: str, schema: Any) -> str:
    """The type of an output that no input has: an attribute says it, or the schema allows one alone."""
    import onnx_ir as ir

    for name in ("to", "dtype", "output_datatype"):
        if name in node.attributes:
            return word(ir.DataType(node.attributes[name].as_int()))
    if "value" in node.attributes:
        return word(node.attributes["value"].as_tensor().dtype)
    kinds = {"value_int": "int64", "value_ints": "int64", "value_float": "float", "value_floats": "float"}
    found = next((f"tensor({kind})" for name, kind in kinds.items() if name in node.attributes), "")
    allowed = {c.type_param_str: list(c.allowed_type_strs) for c in schema.type_constraints}.get(formal, [])
    return found or (allowed[0] if len(allowed) == 1 else formal if formal.startswith("tensor(") else "")


def _schema(domain: str, op: str, opset: int) -> Any:
    """The newest schema that an opset has; None of an operation that ONNX Runtime does not know."""
    versions = _schemas().get((domain, op), ())
    return max((s for s in versions if s.since_version <= opset), key=lambda s: s.since_version, default=None)


@cache
def _schemas() -> dict[tuple[str, str], tuple[Any, ...]]:
    from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

    found: dict[tuple[str, str], tuple[Any, ...]] = {}
    for schema in get_all_operator_schema():
        key = schema.domain, schema.name
        found[key] = (*found.get(key, ()), schema)
    return found
