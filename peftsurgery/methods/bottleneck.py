"""Bottleneck adapters: y' = up(f(down(x))) + r  (Houlsby et al. 2019, https://arxiv.org/abs/1902.00751)

down is (m, d), up is (d, m), f a non-linearity. Houlsby takes x = r = y, the sublayer's output; Pfeiffer (2020,
https://arxiv.org/abs/2005.00247) x = norm(y + residual) and r = y; the parallel adapter (He et al. 2021,
https://arxiv.org/abs/2110.04366) x = residual and r = y, scaled by 4. The words are those of AdapterHub's `BnConfig`
and the names of the parameters those of its files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite, sqrt
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from peftsurgery.errors import NotFoldable, PlanError, listing, nearest
from peftsurgery.method import Map, OutputMethod, Params, whole
from peftsurgery.site import Kind, Site

NON_LINEARITIES: Mapping[str, Map] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_new": partial(functional.gelu, approximate="tanh"),
    "swish": functional.silu,
    "silu": functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leakyrelu": functional.leaky_relu,
    "leaky_relu": functional.leaky_relu,
}
INITS = ("bert", "mam_adapter", "houlsby")
LEARNED = ("learned", "channel")
NORMS = ("adapter_norm_before", "adapter_norm_after")
SCALE = "scaling"


class Entry(NamedTuple):
    """What goes into a bottleneck, and what goes around it."""

    x: Tensor
    around: Tensor


@dataclass(frozen=True)
class Bottleneck(OutputMethod):
    """A bottleneck of two linear maps after a sublayer, or beside it.

    Args:
        reduction_factor: d / m, the width of the model over that of the bottleneck.
        bottleneck_size: m itself, where given.
        non_linearity: `relu`, `gelu`, `gelu_new`, `swish` (or `silu`), `tanh`, `sigmoid` or `leakyrelu`.
        original_ln_before: x is norm(y + residual); in a pre-norm layer, y + residual.
        original_ln_after: the layer goes on with norm(y' + residual), as without an adapter; otherwise with y'.
        residual_before_ln: what goes around: `True` is y, `False` is x, `"post_add"` is y + residual. The latter
            two are for `original_ln_before`.
        ln_before: a LayerNorm of its own in front of the bottleneck.
        ln_after: one behind it.
        adapter_residual_before_ln: what goes around is added in front of `ln_after` and not behind it.
        is_parallel: x is the residual, and y goes around; the options of x and of what goes around mean nothing.
        scaling: a factor of up's output, or `"learned"` (one number) or `"channel"` (one for each of d).
        dropout: probability with which an element of up's output is dropped in training.
        init_weights: `"bert"` draws from N(0, 0.02²), `"houlsby"` from N(0, 0.01²) cut at two deviations, and
            `"mam_adapter"` as a linear layer starts, with up at zero: only the last changes nothing at first.

    Raises:
        PlanError: a hyper-parameter out of its range, or two that exclude one another.
    """

    name: ClassVar[str] = "bottleneck"
    kinds: ClassVar[frozenset[Kind]] = frozenset({Kind.OUTPUT})

    reduction_factor: float = 16
    bottleneck_size: int | None = None
    non_linearity: str = "relu"
    original_ln_before: bool = False
    original_ln_after: bool = True
    residual_before_ln: bool | str = True
    ln_before: bool = False
    ln_after: bool = False
    adapter_residual_before_ln: bool = False
    is_parallel: bool = False
    scaling: float | str = 1.0
    dropout: float = 0.0
    init_weights: str = "bert"

    def __post_init__(self) -> None:
        if self.bottleneck_size is not None:
            whole(self, "bottleneck_size")
        if not _is_number(self.reduction_factor) or self.reduction_factor <= 0:
            raise PlanError(
                f"reduction_factor is {self.reduction_factor!r} and a number above 0. "
                "Try `Bottleneck(reduction_factor=16)`."
            )
        if self.non_linearity not in NON_LINEARITIES:
            near = listing(nearest(self.non_linearity, NON_LINEARITIES) or list(NON_LINEARITIES))
            raise PlanError(f"{self.non_linearity!r} is no non-linearity of a bottleneck. Nearest: {near}.")
        if self.scaling not in LEARNED and not _is_number(self.scaling):
            raise PlanError(
                f"scaling is {self.scaling!r} and a number, 'learned' or 'channel'. Try `Bottleneck(scaling=4.0)`."
            )
        if not 0 <= self.dropout < 1:
            raise PlanError(f"dropout is {self.dropout} and lies in [0, 1). Try `Bottleneck(dropout=0.1)`.")
        if self.init_weights not in INITS:
            raise PlanError(f"init_weights is {self.init_weights!r} and is one of {listing(INITS)}.")
        self._check_residual()

    def _check_residual(self) -> None:
        if self.residual_before_ln not in (True, False, "post_add"):
            raise PlanError(
                f"residual_before_ln is {self.residual_before_ln!r} and is True, False or 'post_add'."
            )
        if self.residual_before_ln == "post_add" and not self.original_ln_before:
            raise PlanError(
                "residual_before_ln='post_add' is the sum in front of the layer's norm, which enters only with "
                "`original_ln_before=True`. Set that too, or leave it out."
            )

    def size(self, width: int) -> int:
        """m for a model of that width: `bottleneck_size`, or the whole part of width / reduction_factor."""
        return self.bottleneck_size or max(1, int(width // self.reduction_factor))

    @property
    def down(self) -> str:
        """The name of down's map: AdapterHub counts a LayerNorm in front of it."""
        return "adapter_down.1" if self.ln_before else "adapter_down.0"

    @property
    def twins(self) -> Mapping[str, str]:
        leaves = ("weight", "bias") if self.ln_before else ()
        return {f"adapter_down.0.{leaf}": f"{NORMS[0]}.{leaf}" for leaf in leaves}

    @property
    def is_final(self) -> bool:
        return not self.original_ln_after

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        d = site.shape[0]
        m = self.size(d)
        linear = {
            f"{self.down}.weight": (m, d),
            f"{self.down}.bias": (m,),
            "adapter_up.weight": (d, m),
            "adapter_up.bias": (d,),
        }
        norms = {f"{name}.{leaf}": (d,) for name in self._norms for leaf in ("weight", "bias")}
        scale = {SCALE: (d,) if self.scaling == "channel" else (1,)} if self.scaling in LEARNED else {}
        return {**linear, **norms, **scale}

    @property
    def _norms(self) -> tuple[str, ...]:
        return tuple(n for n, used in zip(NORMS, (self.ln_before, self.ln_after), strict=True) if used)

    def init(
        self, site: Site, weight: Tensor | None, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        ones = {SCALE, *(f"{name}.weight" for name in self._norms)}
        fresh = {
            name: torch.ones(shape) if name in ones else torch.zeros(shape)
            for name, shape in self.shapes(site).items()
        }
        down, up = fresh[f"{self.down}.weight"], fresh["adapter_up.weight"]
        if self.init_weights == "mam_adapter":
            nn.init.kaiming_uniform_(down, a=sqrt(5), generator=generator)
            return fresh
        for matrix in (down, up):
            if self.init_weights == "bert":
                nn.init.normal_(matrix, std=0.02, generator=generator)
            else:
                nn.init.trunc_normal_(matrix, std=0.01, a=-0.02, b=0.02, generator=generator)
        return fresh

    def scaled(self, factor: float) -> Self:
        around_y = self.is_parallel or self.residual_before_ln is True
        if isinstance(self.scaling, str) or self.ln_after or not around_y:
            raise NotFoldable(
                f"{self!r} has an effect that no number scales: its scale is learned, a LayerNorm follows it, or more "
                "than the sublayer's output goes around it. Export the model with it as it is."
            )
        return replace(self, scaling=self.scaling * factor)

    def forward(self, y: Tensor, residual: Tensor, norm: Map | None, p: Params, training: bool) -> Tensor:
        entry = self.entry(y, residual, norm)
        return self.closed(functional.dropout(self.up(entry.x, p), self.dropout, training), entry.around, p)

    def entry(self, y: Tensor, residual: Tensor, norm: Map | None) -> Entry:
        """What enters the bottleneck, and what goes around it."""
        if self.is_parallel:
            return Entry(residual, y)
        added = y + residual if self.original_ln_before else y
        x = norm(added) if self.original_ln_before and norm is not None else added
        around = added if self.residual_before_ln == "post_add" else y if self.residual_before_ln else x
        return Entry(x, around)

    def up(self, x: Tensor, p: Params) -> Tensor:
        """s · up(f(down(x))), with nothing around it and nothing dropped."""
        inner = _norm(x, p, NORMS[0]) if self.ln_before else x
        hidden = functional.linear(inner, p[f"{self.down}.weight"], p[f"{self.down}.bias"])
        active = NON_LINEARITIES[self.non_linearity](hidden)
        out = functional.linear(active, p["adapter_up.weight"], p["adapter_up.bias"])
        return out * (p[SCALE] if isinstance(self.scaling, str) else self.scaling)

    def closed(self, out: Tensor, around: Tensor, p: Params) -> Tensor:
        """The bottleneck's output with what goes around it, and with `ln_after`."""
        if not self.ln_after:
            return out + around
        if self.adapter_residual_before_ln and not self.is_parallel:
            return _norm(out + around, p, NORMS[1])
        return _norm(out, p, NORMS[1]) + around


def _norm(x: Tensor, p: Params, name: str) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
