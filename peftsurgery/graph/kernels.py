"""Which operations ONNX Runtime has a CUDA kernel for: its own registry, as data, and how it looks one up."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from peftsurgery.graph.calls import Call

DATA = "cuda_kernels.json.gz"
OPEN = 2**31 - 1
"""The last opset of a kernel whose operation has not changed since."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel.

    Args:
        since, until: the opsets whose operation it computes.
        types: for some of the operation's types, by their names or those of inputs, what they may be.
    """

    since: int
    until: int
    types: Mapping[str, frozenset[str]]

    def takes(self, call: Call) -> bool:
        """Whether ONNX Runtime would choose it; a type that is not known is no hindrance."""
        # A kernel without a last opset computes the operation as it was when the kernel was written.
        within = self.since < call.since <= self.until and self.until != OPEN
        fits = self.since == call.since or within
        return fits and all(call.types.get(name, "") in (*types, "") for name, types in self.types.items())


@cache
def registry() -> tuple[str, Mapping[tuple[str, str], tuple[Kernel, ...]]]:
    """The version of ONNX Runtime, and its CUDA kernels by domain and operation."""
    said = json.loads(gzip.decompress(files("peftsurgery.graph").joinpath(DATA).read_bytes()))
    found: dict[tuple[str, str], tuple[Kernel, ...]] = {}
    for one in said["kernels"]:
        key = one["domain"], one["op"]
        types = {name: frozenset(allowed) for name, allowed in one["types"].items()}
        found[key] = (*found.get(key, ()), Kernel(one["since"], one["until"], types))
    return said["onnxruntime"], found


def has_kernel(call: Call) -> bool:
    """Whether there is a CUDA kernel for an operation of these types."""
    _, found = registry()
    return any(kernel.takes(call) for kernel in found.get((call.domain, call.op), ()))
