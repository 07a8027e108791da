"""The operations that a weight method may graft, and what each means by `inner` and `outer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from peftsurgery.method import Map
from peftsurgery.site import Kind, Site


@dataclass(frozen=True, slots=True)
class ModuleOp:
    """The call of one module, as a value: the module, its arguments, and its weight below the graft."""

    base: nn.Module
    root: nn.Module
    site: Site
    dropout: nn.Module | None
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    effective: Callable[[], Tensor]

    @property
    def plain(self) -> bool:
        """Whether the module does what its class does and no more, so that `inner` and `outer` say it."""
        return False

    @property
    def x(self) -> Tensor:
        """The first argument."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()))  # type: ignore[no-any-return]

    def __call__(self, x: Tensor) -> Tensor:
        return self.base(*self.args, **self.kwargs)  # type: ignore[no-any-return]

    def folded(self, x: Tensor, fold: Map, fold_bias: Map) -> Tensor:
        weight, bias = self.root.weight, self.root._parameters.get("bias")
        assert isinstance(weight, Tensor)
        changed = {
            "weight": self.site.layout.stored(fold(self.effective()), self.site.shape).to(weight.dtype)
        }
        if bias is not None:
            changed["bias"] = fold_bias(bias.to(torch.promote_types(bias.dtype, torch.float32))).to(
                bias.dtype
            )
        return functional_call(self.root, changed, self.args, dict(self.kwargs))  # type: ignore[no-any-return]

    def like_base(self, y: Tensor) -> Tensor:
        """`y` in the dtype that the base gives."""
        if torch.is_autocast_enabled(y.device.type):
            return y
        weight = self.root.weight
        assert isinstance(weight, Tensor)
        return y.to(weight.dtype)

    def drop(self, x: Tensor) -> Tensor:
        return x if self.dropout is None or not x.is_floating_point() else self.dropout(x)

    def inner(self, x: Tensor, matrix: Tensor) -> Tensor:
        raise NotImplementedError

    def outer(self, h: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(h, matrix, bias)


class LinearOp(ModuleOp):
    """nn.Linear, and transformers' Conv1D."""

    __slots__ = ()

    @property
    def plain(self) -> bool:
        return True

    def inner(self, x: Tensor, matrix: Tensor) -> Tensor:
        return F.linear(x.to(matrix.dtype), matrix)


class EmbeddingOp(ModuleOp):
    """nn.Embedding: a lookup is the matrix product with one-hot columns."""

    __slots__ = ()

    @property
    def plain(self) -> bool:
        return self.root.max_norm is None

    def inner(self, x: Tensor, matrix: Tensor) -> Tensor:
        return F.embedding(x, matrix.t())


class ConvOp(ModuleOp):
    """nn.Conv1d, 2d and 3d with one group."""

    __slots__ = ()

    @property
    def plain(self) -> bool:
        return self.root.padding_mode == "zeros"

    def inner(self, x: Tensor, matrix: Tensor) -> Tensor:
        root: Any = self.root
        conv: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[len(self.site.shape) - 3]
        kernel = matrix.reshape(-1, *self.site.shape[1:])
        return conv(x.to(matrix.dtype), kernel, None, root.stride, root.padding, root.dilation)

    def outer(self, h: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(h.movedim(1, -1), matrix, bias).movedim(-1, 1)


# Only the very classes: a subclass may scale, shift or look up otherwise, and then the definition is used.
EXACT: dict[type[nn.Module], type[ModuleOp]] = {
    nn.Linear: LinearOp,
    nn.Embedding: EmbeddingOp,
    nn.Conv1d: ConvOp,
    nn.Conv2d: ConvOp,
    nn.Conv3d: ConvOp,
}


def operation(base: nn.Module, root: nn.Module, site: Site, *rest: Any) -> ModuleOp:
    """The operation of `root`, called through `base` (which may be a graft itself)."""
    kind = EXACT.get(type(root))
    if kind is None:
        kind = LinearOp if site.kind is Kind.LINEAR and type(root).__name__ == "Conv1D" else ModuleOp
    return kind(base, root, site, *rest)
