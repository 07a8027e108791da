"""Where ONNX Runtime would run each node of a graph on a CUDA machine, told without one."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from peftsurgery.graph.calls import Call, calls
from peftsurgery.graph.kernels import has_kernel, registry

if TYPE_CHECKING:
    import onnx_ir as ir

HOST = {
    "Reshape": (1,),
    "Expand": (1,),
    "Slice": (1, 2, 3, 4),
    "Range": (0, 1, 2),
    "Squeeze": (1,),
    "Unsqueeze": (1,),
    "Pad": (1, 3),
    "ConstantOfShape": (0,),
    "Split": (1,),
    "Tile": (1,),
    "Trilu": (1,),
    "CumSum": (1,),
    "ReduceMax": (1,),
    "ReduceMean": (1,),
    "ReduceSum": (1,),
    "TopK": (1,),
    "Resize": (1, 2, 3),
    "GroupQueryAttention": (6,),
    "Loop": (0, 1),
    "If": (0,),
}
"""Inputs that the CUDA kernels read in the CPU's memory: shapes, axes, bounds."""
SHAPES = frozenset({"Shape", "Size"})
WHOLE = frozenset({"tensor(int64)", "tensor(int32)", "tensor(bool)"})


@dataclass(frozen=True, slots=True)
class Lost:
    """A node that computes and has no CUDA kernel."""

    name: str
    op: str
    types: str


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the nodes of a graph run.

    Args:
        kernels: the version of ONNX Runtime whose kernels were looked up.
        device: how many nodes run on CUDA.
        shapes: how many are integer arithmetic on shapes, which ONNX Runtime keeps on the CPU on purpose.
        lost: what would run on the CPU because CUDA has no kernel for it.
        copies: how many values have to be copied between the two, once each.
    """

    kernels: str
    device: int
    shapes: int
    lost: tuple[Lost, ...]
    copies: int

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        lost = f", {len(self.lost)} without a CUDA kernel" if self.lost else ""
        return (
            f"{self.device} nodes on CUDA, {self.shapes} of shape arithmetic on the CPU{lost}, "
            f"{self.copies} copies between them (kernels of onnxruntime {self.kernels})"
        )


def placed(model: ir.Model) -> Placement:
    """Where the nodes of a graph would run; no weight is read and no device is needed."""
    walk = _Walk()
    for call in calls(model):
        walk.see(call)
    version, _ = registry()
    return Placement(version, walk.device, walk.shapes, tuple(walk.lost), len(walk.crossing))


class _Walk:
    """What was found of the nodes before, in a graph's order."""

    def __init__(self) -> None:
        self.device = self.shapes = 0
        self.lost: list[Lost] = []
        self.crossing: set[str | None] = set()
        self.where: dict[str | None, str] = {}
        """For each value that a node gave: `cpu` or `cuda`; constants lie wherever they are read."""

    def see(self, call: Call) -> None:
        if call.op == "Constant":
            return
        side = self._side(call)
        self._fetch(call, side)
        for output in call.node.outputs:
            self.where[output.name] = "cpu" if call.op in SHAPES else side

    def _side(self, call: Call) -> str:
        if call.op in SHAPES:
            self.device += 1
            return "cuda"
        if self._is_of_shapes(call):
            self.shapes += 1
            return "cpu"
        if has_kernel(call):
            self.device += 1
            return "cuda"
        types = ", ".join(f"{name}: {kind.removeprefix('tensor')}" for name, kind in call.types.items())
        self.lost.append(
            Lost(call.node.name or "", f"{call.domain}{'.' * bool(call.domain)}{call.op}", types)
        )
        return "cpu"

    def _is_of_shapes(self, call: Call) -> bool:
        """Whether every value that it reads is on the CPU already, and one is not just a kernel's shape."""
        host = HOST.get(call.op, ())
        given = [
            (i, self.where[v.name]) for i, v in enumerate(call.node.inputs) if v and v.name in self.where
        ]
        reads = [where for i, where in given if i not in host]
        outputs = {call.types.get(formal, "") for formal in call.gives}
        return bool(reads) and {where for _, where in given} == {"cpu"} and outputs <= WHOLE

    def _fetch(self, call: Call, side: str) -> None:
        """Note what has to be copied to where the node reads it."""
        host = HOST.get(call.op, ()) if side == "cuda" else ()
        for index, value in enumerate(call.node.inputs):
            if value is None or value.name not in self.where or call.op in SHAPES:
                continue
            wanted = "cpu" if index in host else side
            if self.where[value.name] != wanted:
                self.crossing.add(value.name)
