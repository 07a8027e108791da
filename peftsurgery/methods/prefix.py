"""Prefix tuning: keys and values in front of every layer's own  (Li & Liang 2021, https://arxiv.org/abs/2101.00190)

attention(q, [Pk; k], [Pv; v]) replaces attention(q, k, v). The table of all layers is trained as it is, or is
W₂·tanh(W₀·E + b₀) + b₂; the names of the parameters of the latter are those of PEFT's `PrefixEncoder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from peftsurgery.errors import PlanError, UnsupportedSite
from peftsurgery.method import TABLE, Params, TokenMethod, whole
from peftsurgery.methods import starts
from peftsurgery.site import Kind, Site

EMBEDDING, INNER, OUTER = "embedding.weight", "transform.0", "transform.2"


@dataclass(frozen=True)
class PrefixTuning(TokenMethod):
    """Trained keys and values in front of every attention layer's own.

    Args:
        num_virtual_tokens: how many.
        prefix_projection: train a small table and two linear maps, which baking evaluates and drops.
        encoder_hidden_size: the width between the two maps; that of the keys by default.
        init_weights: `"zero"` starts with keys and values of zero; by default they are drawn as in PEFT.

    Raises:
        PlanError: a hyper-parameter out of its range.
    """

    name: ClassVar[str] = "prefix-tuning"
    peft_type: ClassVar[str] = "PREFIX_TUNING"
    kinds: ClassVar[frozenset[Kind]] = frozenset({Kind.ATTENTION})

    num_virtual_tokens: int = 20
    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    init_weights: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder_hidden_size is not None:
            whole(self, "encoder_hidden_size")
        if self.init_weights not in (None, "zero"):
            raise PlanError(f"init_weights is {self.init_weights!r} and is None or 'zero'. Leave it out.")

    def shared_shapes(self, sites: Sequence[Site]) -> dict[str, tuple[int, ...]]:
        width = _width(sites)
        out = 2 * len(sites) * width
        if not self.prefix_projection:
            return {TABLE: (self.num_virtual_tokens, out)}
        hidden = self.encoder_hidden_size or width
        return {
            EMBEDDING: (self.num_virtual_tokens, width),
            f"{INNER}.weight": (hidden, width),
            f"{INNER}.bias": (hidden,),
            f"{OUTER}.weight": (out, hidden),
            f"{OUTER}.bias": (out,),
        }

    def init_shared(
        self,
        sites: Sequence[Site],
        generator: torch.Generator | None = None,
        vocabulary: Tensor | None = None,
        ids: Sequence[int] = (),
    ) -> dict[str, Tensor]:
        shapes = self.shared_shapes(sites)
        first = EMBEDDING if self.prefix_projection else TABLE
        maps = {name: shape for name, shape in shapes.items() if name != first}
        fresh = {first: starts.normal(shapes[first], generator), **starts.linear(maps, generator)}
        if self.init_weights == "zero":
            last = [name for name in fresh if name == TABLE or name.startswith(OUTER)]
            fresh |= {name: torch.zeros(shapes[name]) for name in last}
        return fresh

    def tokens(self, p: Params, *, training: bool = False) -> Tensor:
        if not self.prefix_projection:
            return p[TABLE]
        x = p[EMBEDDING].unsqueeze(0)  # a batch of one, as in PEFT: it decides which kernel sums, so the bits
        h = torch.tanh(linear(x, p[f"{INNER}.weight"], p[f"{INNER}.bias"]))
        return linear(h, p[f"{OUTER}.weight"], p[f"{OUTER}.bias"])[0]

    def baked(self) -> PrefixTuning:
        return PrefixTuning(self.num_virtual_tokens) if self.prefix_projection else self


def _width(sites: Sequence[Site]) -> int:
    """kv_heads · head_dim, which all layers share."""
    odd = next((site for site in sites if site.shape != sites[0].shape), None)
    if odd is not None:
        raise UnsupportedSite(
            f"{odd} has other keys than {sites[0]}, and a prefix needs layers that are alike. "
            "Take prompt tuning for this model; nothing was changed.",
            site=odd.name,
        )
    return prod(sites[0].shape)
