"""Weights that transformers computes on loading, each made when it is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from peftsurgery.disk.checkpoint import Stored, load
from peftsurgery.live.assembly import Assembly, assemblies


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One parameter of an assembly.

    Args:
        stored: the tensors of the checkpoint.
        dtype, shape: the parameter's.
    """

    name: str
    assembly: Assembly
    stored: Mapping[str, Stored]
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """How large it is."""
        return prod(self.shape) * self.dtype.itemsize

    def make(self) -> Tensor:
        """It, computed by transformers from what is stored, and no more of the model."""
        made = self.assembly(lambda name: load(self.stored[name]))
        return made[self.name].to(self.dtype).contiguous()


def parts(model: nn.Module, stored: Mapping[str, Stored]) -> dict[str, Part]:
    """The parameters of the model that are assembled, by name; no weight is read."""
    parameters = dict(model.named_parameters(remove_duplicate=False))

    def blank(name: str) -> Tensor:
        return torch.empty(stored[name].shape, dtype=stored[name].torch_dtype, device="meta")

    return {
        name: Part(name, assembly, stored, parameters[name].dtype, tuple(shape.shape))
        for assembly in assemblies(model, stored)
        for name, shape in assembly(blank).items()
        if name in parameters
    }
