"""The sites of a graph: initializers named `X.weight`, and what the nodes that read them make of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from peftsurgery.graph.passes import swaps
from peftsurgery.site import Kind, Layout, Site

if TYPE_CHECKING:
    import onnx_ir as ir

Role = tuple[Kind, Layout]
FLIPPED = {Layout.OUT_IN: Layout.IN_OUT, Layout.IN_OUT: Layout.OUT_IN}
OTHER: Role = (Kind.OTHER, Layout.OUT_IN)
WEIGHT = ".weight"
ALIASES = "aliases"


def sites(model: ir.Model) -> list[Site]:
    """Every initializer named `X.weight` that a node reads, in the graph's order.

    The second factor of a MatMul is a linear map stored (in, out), below a Transpose or in a Gemm
    or FusedMatMul with transB (out, in); what a Gather looks rows up in is an embedding; a Conv with one group is
    a convolution. A tied weight is listed once, as the embedding.
    """
    values = model.graph.initializers.items()
    return [_site(name, value) for name, value in values if name.endswith(WEIGHT) and value.uses()]


def ties(model: ir.Model) -> list[tuple[str, ...]]:
    """Initializers that play several parts; each with the other names that it had in the model.

    In a graph that peftsurgery did not write those names are unknown, and the nodes that read it stand there.
    """
    groups = []
    for name, value in model.graph.initializers.items():
        others = value.metadata_props.get(ALIASES)
        if others:
            groups.append((name, *others.split(",")))
        elif len({kind for kind, _ in _roles(value)}) > 1:
            groups.append((name, *(str(node.name) for node, _ in value.uses())))
    return groups


def alias(model: ir.Model, names: Mapping[str, tuple[str, ...]]) -> None:
    """Note on each initializer the other names that its tensor had in the model, for `ties`."""
    for name, others in names.items():
        if others and name in model.graph.initializers:
            model.graph.initializers[name].metadata_props[ALIASES] = ",".join(others)


def _site(name: str, value: ir.Value) -> Site:
    assert value.shape is not None
    kind, layout = _role(value)
    return Site(name.removesuffix(WEIGHT), kind, tuple(value.shape.numpy()), layout)


def _role(value: ir.Value) -> Role:
    tensor = value.const_value
    if tensor is None or not tensor.dtype.is_floating_point():
        return OTHER
    roles = set(_roles(value))
    looked_up = [role for role in roles if role[0] is Kind.EMBEDDING]
    if looked_up:
        return looked_up[0]
    return roles.pop() if len(roles) == 1 else OTHER


def _roles(value: ir.Value, rank: int | None = None) -> Iterator[Role]:
    rank = rank or (0 if value.shape is None else value.shape.rank())
    for node, index in value.uses():
        if swaps(node):
            yield from ((kind, FLIPPED[layout]) for kind, layout in _roles(node.outputs[0], rank))
        elif node.op_type in ("Identity", "Cast"):
            yield from _roles(node.outputs[0], rank)
        else:
            yield _use(node, index, rank)


def _use(node: ir.Node, index: int, rank: int) -> Role:
    match node.op_type, index, rank:
        case "MatMul", 1, 2:
            return Kind.LINEAR, Layout.IN_OUT
        case "Gemm", 1, 2:
            return Kind.LINEAR, Layout.OUT_IN if _int(node, "transB", 0) else Layout.IN_OUT
        case "FusedMatMul", 1, 2:
            return Kind.LINEAR, Layout.OUT_IN if _int(node, "transB", 0) else Layout.IN_OUT
        case "Gather", 0, 2 if _int(node, "axis", 0) == 0:
            return Kind.EMBEDDING, Layout.IN_OUT
        case "Conv", 1, _ if _int(node, "group", 1) == 1:
            return Kind.CONV, Layout.OUT_IN
    return OTHER


def _int(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()
