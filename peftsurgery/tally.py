"""How far folding moved a tensor, and how much of that its dtype could hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

EVERY = 16
"""Every how many-th tile of a tensor a merge measures: all of them would take a tenth of its whole time."""
VANISHED = 0.9
"""The part of a change that rounding has taken when as good as nothing is left."""


@dataclass(frozen=True, slots=True)
class Tally:
    """Sums over the elements of some tiles; tallies of tiles add up to that of their tensor.

    Args:
        numel: how many elements were counted, or are spoken for.
        changed: how many of them are stored otherwise than before.
        delta: Σ (W' − W)², before rounding.
        error: Σ (stored − W')², what the rounding to the stored dtype put off.
    """

    numel: int = 0
    changed: int = 0
    delta: float = 0.0
    error: float = 0.0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.numel + other.numel,
            self.changed + other.changed,
            self.delta + other.delta,
            self.error + other.error,
        )

    def of(self, numel: int) -> Tally:
        """What it says of `numel` elements, of which it counted some."""
        if self.numel in (0, numel):
            return self
        by = numel / self.numel
        return Tally(numel, round(self.changed * by), self.delta * by, self.error * by)

    @property
    def vanished(self) -> bool:
        """Whether there was a change, and as good as nothing of it is stored."""
        return self.lost >= VANISHED

    @property
    def norm(self) -> float:
        """‖W' − W‖, the Frobenius norm of the change."""
        return sqrt(self.delta)

    @property
    def share(self) -> float:
        """The share of elements that are stored otherwise than before."""
        return self.changed / max(self.numel, 1)

    @property
    def lost(self) -> float:
        """‖stored − W'‖ / ‖W' − W‖: the part of the change that rounding took or made up; 0 for no change."""
        return sqrt(self.error / self.delta) if self.delta else 0.0


def told(tallies: Mapping[str, Tally]) -> dict[str, dict[str, float]]:
    """What they say of every tensor, as JSON values."""
    return {
        name: {"delta_norm": t.norm, "changed": t.share, "lost": t.lost}
        for name, t in sorted(tallies.items())
    }


def measured(tallies: Mapping[str, Tally]) -> dict[str, object]:
    """What `peftsurgery.json` says of how far a merge moved its tensors."""
    return {"measured": f"one tile of {EVERY}", "tensors": told(tallies)}


def tally(base: Tensor, start: Tensor, value: Tensor, stored: Tensor) -> Tally:
    """The tally of one tile.

    Args:
        base, start: what lay there, in its own dtype and in that of `value`.
        value: what folding made of it, in float32 or wider.
        stored: `value`, rounded.
    """
    held = stored.to(value)
    was = start if base.dtype is stored.dtype else base.to(stored.dtype).to(value)
    room = value - start
    delta = _squares(room)
    changed = torch.ne(was, held, out=room).sum(dtype=torch.float64)  # several times faster than counting
    return Tally(stored.numel(), int(changed), delta, _squares(torch.sub(held, value, out=room)))


def _squares(tensor: Tensor) -> float:
    flat = tensor.flatten()
    return float(torch.dot(flat, flat))
