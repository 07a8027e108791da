"""LoRA: W' = W + s·B·A  (Hu et al. 2021, https://arxiv.org/abs/2106.09685)

A is (r, in), B is (out, r), s = lora_alpha / r; rank-stabilised LoRA takes s = lora_alpha / √r
(Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import frexp, isfinite, sqrt
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from peftsurgery.errors import PlanError
from peftsurgery.method import Op, Params, WeightMethod
from peftsurgery.site import Kind, Site

A_B = {
    Kind.LINEAR: ("lora_A.weight", "lora_B.weight"),
    Kind.CONV: ("lora_A.weight", "lora_B.weight"),
    Kind.EMBEDDING: ("lora_embedding_A", "lora_embedding_B"),
}
SHIFT = "lora_B.bias"


@dataclass(frozen=True)
class LoRA(WeightMethod):
    """Low-rank adaptation of linear maps, embeddings and convolutions.

    Args:
        r: rank of the update.
        lora_alpha: numerator of the scale.
        lora_dropout: probability with which an element of the input is dropped in training.
        use_rslora: scale by √r instead of r.
        init_lora_weights: `True` draws A as PEFT does (Kaiming-uniform, a = √5), `"gaussian"` as the
            paper does (A ~ N(0, 1/r²)); B starts at zero, so a fresh LoRA changes nothing. On an
            embedding A starts at zero and B is drawn from N(0, 1), as in PEFT.
        lora_bias: B has a bias of its own, which folds into the base's.

    Raises:
        PlanError: a hyper-parameter out of its range.
    """

    name: ClassVar[str] = "lora"
    peft_type: ClassVar[str] = "LORA"
    kinds: ClassVar[frozenset[Kind]] = frozenset(A_B)

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    lora_bias: bool = False

    def __post_init__(self) -> None:
        if self.r < 1:
            raise PlanError(f"r is {self.r} and a rank is at least 1. Try `LoRA(r=8)`.")
        if not isfinite(self.lora_alpha):
            raise PlanError(
                f"lora_alpha is {self.lora_alpha}, which is no number. Try `LoRA(lora_alpha=16)`."
            )
        if not 0 <= self.lora_dropout < 1:
            raise PlanError(
                f"lora_dropout is {self.lora_dropout} and lies in [0, 1). Try `LoRA(lora_dropout=0.05)`."
            )
        if self.init_lora_weights not in (True, "gaussian"):
            raise PlanError(
                f"init_lora_weights is {self.init_lora_weights!r}; peftsurgery starts a LoRA with True or 'gaussian'."
            )

    @property
    def scaling(self) -> float:
        """The factor s."""
        return self.lora_alpha / (sqrt(self.r) if self.use_rslora else self.r)

    @property
    def dropout(self) -> float:
        return self.lora_dropout

    @property
    def moves_bias(self) -> bool:
        return self.lora_bias

    def scaled(self, factor: float) -> Self:
        return replace(self, lora_alpha=self.lora_alpha * factor)

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        a, b = A_B[site.kind]
        out, inner = site.matrix_shape
        kernel = site.shape[1:] if site.kind is Kind.CONV else (inner,)
        ones = (1,) * (len(kernel) - 1)
        shift = {SHIFT: (out,)} if self.lora_bias else {}
        return {a: (self.r, *kernel), b: (out, self.r, *ones), **shift}

    def init(
        self, site: Site, weight: Tensor | None, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        fresh = {name: torch.zeros(shape) for name, shape in self.shapes(site).items()}
        a, b = A_B[site.kind]
        if site.kind is Kind.EMBEDDING:
            nn.init.normal_(fresh[b], generator=generator)
        elif self.init_lora_weights == "gaussian":
            nn.init.normal_(fresh[a], std=1 / self.r, generator=generator)
        else:
            nn.init.kaiming_uniform_(fresh[a], a=sqrt(5), generator=generator)
        return fresh

    def fold(self, w: Tensor, p: Params) -> Tensor:
        a, b = _matrices(p)
        if frexp(self.scaling)[0] == 0.5:  # a power of two: the small factor is scaled with the same bits
            return ((b * self.scaling) @ a).add_(w)
        return (b @ a).mul_(self.scaling).add_(w)  # in its own memory: w is not touched

    def part(self, p: Params, rows: slice, columns: slice) -> Params | None:
        a, b = next(names for names in A_B.values() if names[0] in p)
        inner = _matrix(p[a])
        return {
            a: inner if columns == slice(None) else inner[:, columns],
            b: p[b] if rows == slice(None) else p[b][rows],
        }

    def fold_bias(self, bias: Tensor, p: Params) -> Tensor:
        return bias + p[SHIFT] * self.scaling if self.lora_bias else bias

    def forward(self, op: Op, x: Tensor, p: Params) -> Tensor:
        a, b = _matrices(p)
        return op(x) + op.outer(op.inner(op.drop(x), a), b, p.get(SHIFT)) * self.scaling


def _matrices(p: Params) -> tuple[Tensor, Tensor]:
    a, b = next((p[a], p[b]) for a, b in A_B.values() if a in p)
    return _matrix(a), _matrix(b)


def _matrix(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == 2 else tensor.flatten(1)
