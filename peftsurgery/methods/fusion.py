"""AdapterFusion: attention over adapters  (Pfeiffer et al. 2021, https://arxiv.org/abs/2005.00247)

y' = Σ wᵢ·V·uᵢ + r with w = softmaxᵢ((Q·x + q₀)·(K·uᵢ + k₀) / t), uᵢ what adapter i adds, x what enters the adapters and
r what goes around them. There is no 1/√d. Q, K and V are (d, d), under the names that AdapterHub's files give them; the
parameters of a member have its name in front.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from peftsurgery.errors import PlanError, listing
from peftsurgery.method import Map, OutputMethod, Params
from peftsurgery.methods.bottleneck import Bottleneck
from peftsurgery.site import Kind, Site

MAPS = ("query", "key", "value")
VALUE = "value.weight"
ELSEWHERE = 1e-6
"""What AdapterHub starts V with beside its diagonal of ones."""


@dataclass(frozen=True)
class AdapterFusion(OutputMethod):
    """A mixture of trained bottleneck adapters, weighted anew for every token.

    Args:
        members: the adapters that are fused, by name. The last of them says what enters and what goes around.
            Without any it fuses what `inject(…, adapters=…)` is given.
        query, key, value: whether there is such a map; what it maps enters as it is otherwise. One of the first
            two is needed.
        query_before_ln: the query is made of y and not of what enters the adapters.
        residual_before: what goes around is added to every value and key, and not to the mixture.
        temperature: t. AdapterHub's `temperature: true` falls from 50 to 1 over its first 980 calls, evaluation
            included; there is no such hidden count here, and 1 is where it ends.
        value_before_softmax: V maps each adapter's output, and not the mixture; both give the same.
        value_initialized: V starts as the identity, or near zero.
        regularization: `penalty` pulls V to the identity.
        dropout_prob: probability with which a score is dropped in training; None drops nothing.

    Raises:
        PlanError: a name that cannot be a member's, or a hyper-parameter out of its range.
    """

    name: ClassVar[str] = "fusion"
    kinds: ClassVar[frozenset[Kind]] = frozenset({Kind.OUTPUT})

    members: tuple[tuple[str, Bottleneck], ...] = ()
    query: bool = True
    key: bool = True
    value: bool = True
    query_before_ln: bool = False
    residual_before: bool = False
    temperature: float = 1.0
    value_before_softmax: bool = True
    value_initialized: bool = True
    regularization: bool = True
    dropout_prob: float | None = None

    def __post_init__(self) -> None:
        names = [name for name, _ in self.members]
        wrong = [n for n in names if n in MAPS or names.count(n) > 1 or not re.fullmatch(r"[\w-]+", n)]
        if wrong:
            raise PlanError(
                f"{wrong[0]!r} cannot name a member of {listing(names)}: each needs a name of its own, of letters, "
                f"digits, `_` and `-`, that is none of {listing(MAPS)}."
            )
        if not (self.query or self.key):
            raise PlanError("A fusion without a query and a key trains no attention. Leave one of them in.")
        if not self.temperature > 0:
            raise PlanError(f"temperature is {self.temperature} and is above 0. Leave it out for 1.")
        if not 0 <= (self.dropout_prob or 0.0) < 1:
            raise PlanError(f"dropout_prob is {self.dropout_prob} and lies in [0, 1). Leave it out for none.")

    def check(self, site: Site) -> str | None:
        return super().check(site) if self.members else "gets a fusion of nothing; give `adapters=[…]`"

    @property
    def is_final(self) -> bool:
        return self._last.is_final

    @property
    def _last(self) -> Bottleneck:
        return self.members[-1][1]

    @property
    def _maps(self) -> tuple[str, ...]:
        return tuple(n for n, used in zip(MAPS, (self.query, self.key, self.value), strict=True) if used)

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        members = {f"{name}.{key}": s for name, m in self.members for key, s in m.shapes(site).items()}
        return {**self._own(site), **members}

    def _own(self, site: Site) -> dict[str, tuple[int, ...]]:
        d = site.shape[0]
        matrices = {f"{name}.weight": (d, d) for name in self._maps}
        return {**matrices, **{f"{name}.bias": (d,) for name in self._maps if name != "value"}}

    def init(
        self, site: Site, weight: Tensor | None, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        fresh = {name: torch.zeros(shape) for name, shape in self._own(site).items()}
        for name in self._maps:
            nn.init.normal_(fresh[f"{name}.weight"], std=0.02, generator=generator)
        if self.value and self.value_initialized:
            fresh[VALUE].fill_(ELSEWHERE).fill_diagonal_(1.0)
        started = ((name, m.init(site, None, generator)) for name, m in self.members)
        return {**fresh, **{f"{name}.{key}": p for name, own in started for key, p in own.items()}}

    def stage(self, parameter: str) -> int:
        return 2 if parameter.partition(".")[0] in MAPS else 1

    @property
    def trains_in(self) -> int:
        return 2

    def penalty(self, p: Params) -> Tensor | None:
        """0.01 · |V - I|², AdapterHub's regularisation of one site."""
        if not (self.regularization and self.value):
            return None
        v = p[VALUE]
        return 0.01 * (v - torch.eye(len(v), dtype=v.dtype, device=v.device)).pow(2).sum()

    def forward(self, y: Tensor, residual: Tensor, norm: Map | None, p: Params, training: bool) -> Tensor:
        query, heard, around = self._heard(y, residual, norm, p)
        scores = functional.dropout(self._scores(query, heard, p), self.dropout_prob or 0.0, training)
        early = self.value and self.value_before_softmax
        mixed = (self._weights(scores).unsqueeze(-2) @ (_map(heard, p, "value") if early else heard)).squeeze(
            -2
        )
        if self.value and not early:
            mixed = _map(mixed, p, "value")
        whole = mixed if self.residual_before else mixed + around
        return whole + y if self._last.is_parallel else whole

    def weights(self, y: Tensor, residual: Tensor, norm: Map | None, p: Params) -> Tensor:
        """How much each member is listened to: (…, members), every row a distribution."""
        query, heard, _ = self._heard(y, residual, norm, p)
        return self._weights(self._scores(query, heard, p))

    def _heard(
        self, y: Tensor, residual: Tensor, norm: Map | None, p: Params
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What asks, (…, d), what the members say, (…, members, d), and what goes around them, (…, d).

        Beside the sublayer, its input is all that enters, and it goes around as well.
        """
        last = self._last
        x, around = (residual, residual) if last.is_parallel else last.entry(y, residual, norm)
        said = torch.stack([member.up(x, part(p, name)) for name, member in self.members]).movedim(0, -2)
        query = y if self.query_before_ln and not last.is_parallel else x
        return query, said + around.unsqueeze(-2) if self.residual_before else said, around

    def _scores(self, query: Tensor, heard: Tensor, p: Params) -> Tensor:
        q = _map(query, p, "query") if self.query else query
        k = _map(heard, p, "key") if self.key else heard
        return (q.unsqueeze(-2) @ k.transpose(-2, -1)).squeeze(-2)

    def _weights(self, scores: Tensor) -> Tensor:
        return (scores / self.temperature).softmax(-1)


def part(p: Params, member: str) -> dict[str, Tensor]:
    """The parameters of one member, under the names that they have without a fusion."""
    head = f"{member}."
    return {name.removeprefix(head): value for name, value in p.items() if name.startswith(head)}


def _map(x: Tensor, p: Params, name: str) -> Tensor:
    return functional.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))
