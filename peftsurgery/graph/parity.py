"""Is what runs the thing that was trained? Two runners, the same inputs, compared at attended tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from peftsurgery.errors import ParityError
from peftsurgery.graph import cache
from peftsurgery.graph.inputs import SHAPES, Array, as_torch, generated
from peftsurgery.graph.posture import evaluating
from peftsurgery.graph.signature import Port, Signature, call

Runner = Callable[[Mapping[str, Array]], Mapping[str, Array]]
SCORED = frozenset({"logits", "start_logits", "end_logits"})
CLOSE = 1e-4
"""What float32 is off at most, whatever an output's size."""
ROUNDINGS = 8
"""So many steps of a half-precision dtype, of its largest output, are its own rounding."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """The largest absolute difference that is accepted of an output.

    Args:
        absolute: whatever the output's size.
        relative: of the output's largest value, where that is more.
        why: whose rounding it is, where it is one's.
    """

    absolute: float
    relative: float = 0.0
    why: str = ""

    def of(self, scale: float) -> float:
        """For an output whose largest value is `scale`."""
        return max(self.absolute, self.relative * scale)


def tolerance(dtype: torch.dtype, *, widened: bool = False) -> Tolerance:
    """What two right implementations differ by in `dtype`: 1e-4 in float32; in half precision 8 of its steps (eps).

    A value of half precision is off by half a step of its own size, and what is summed of many by more. The sizes
    are those of the output, so a half's tolerance grows with the logits and float32's does not.

    Args:
        widened: the arithmetic ran in float32, so that only constants were rounded: one step.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return Tolerance(CLOSE)
    steps = 1 if widened else ROUNDINGS
    share = steps * torch.finfo(dtype).eps
    return Tolerance(share, share, f"{steps} step{'s' * (steps > 1)} of {str(dtype).removeprefix('torch.')}")


@dataclass(frozen=True, slots=True)
class Row:
    """One output on one batch.

    Args:
        length: how many tokens a row has, or an image's width in pixels.
        max_abs_diff, mean_abs_diff: over the attended positions; infinite where only one side is finite,
            or where an output is missing or has another shape.
        top1_agreement: share of equal decisions, where the output decides something.
        past: how many tokens were seen before.
        kl: the mean Kullback-Leibler divergence of the first's probabilities from the reference's, in nats, where
            the output decides something.
        scale: the largest finite value of the reference.
    """

    output: str
    batch: int
    length: int
    max_abs_diff: float
    mean_abs_diff: float
    top1_agreement: float | None
    past: int = 0
    kl: float | None = None
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Parity:
    """What a comparison found.

    Args:
        rows: one for every output of every batch.
        accepted: how large a `max_abs_diff` may be.
        provider: where the first runner ran, if it says so.
        remark: what the first runner says about that.
    """

    rows: tuple[Row, ...]
    accepted: Tolerance
    provider: str = ""
    remark: str = ""

    @property
    def worst(self) -> Row:
        """The row that comes nearest to what is accepted of it, or exceeds it most."""
        return max(self.rows, key=lambda row: (self._share(row), row.max_abs_diff))

    def _share(self, row: Row) -> float:
        allowed = self.accepted.of(row.scale)
        return row.max_abs_diff / allowed if allowed else row.max_abs_diff

    @property
    def tolerance(self) -> float:
        """The largest difference that is accepted of the worst row."""
        return self.accepted.of(self.worst.scale)

    @property
    def max_abs_diff(self) -> float:
        return self.worst.max_abs_diff

    @property
    def mean_abs_diff(self) -> float:
        return float(np.mean([row.mean_abs_diff for row in self.rows]))

    @property
    def top1_agreement(self) -> float | None:
        shares = [row.top1_agreement for row in self.rows if row.top1_agreement is not None]
        return min(shares) if shares else None

    @property
    def kl(self) -> float | None:
        found = [row.kl for row in self.rows if row.kl is not None]
        return max(found) if found else None

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        summary = {
            name: getattr(self, name)
            for name in ("max_abs_diff", "mean_abs_diff", "top1_agreement", "kl", "tolerance", "provider")
        }
        said = {"accepted": asdict(self.accepted), "remark": self.remark}
        return {**summary, **said, "rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        agreed = "" if self.top1_agreement is None else f", top-1 agreement {self.top1_agreement:.1%}"
        many = f"{agreed} on {len(self.rows)} comparisons"
        if not self.accepted.why:
            return f"max |Δ| {self.max_abs_diff:.2e} (tolerance {self.tolerance:.0e}){many}"
        allowed = f"{self.tolerance:.1e} is allowed, {self.accepted.why}"
        return f"|Δ| {self.max_abs_diff:.1e} at worst, where {allowed}{many}"


def compare(
    runner: Runner,
    reference: Runner,
    signature: Signature,
    *,
    batches: Iterable[Mapping[str, Array]] = (),
    shapes: Sequence[tuple[int, int]] = SHAPES,
    accepted: Tolerance = Tolerance(CLOSE),
    seed: int = 0,
) -> Parity:
    """Run both on generated batches of several shapes, right-padded, and on the given ones.

    Args:
        runner, reference: from inputs by name to outputs by name: a `Session`, or `torch_runner(…)`.
        batches: real inputs by name, each (batch, length).
    """
    feeds = [*generated(signature, shapes, seed), *batches]
    rows = tuple(row for feed in feeds for row in _rows(runner(feed), reference(feed), feed, signature))
    return Parity(rows, accepted, getattr(runner, "provider", ""), getattr(runner, "remark", ""))


def check(parity: Parity) -> Parity:
    """The comparison itself, when every difference is within its tolerance.

    Raises:
        ParityError: the worst output, and by how much it is off.
    """
    worst = parity.worst
    if worst.max_abs_diff <= parity.tolerance:
        return parity
    raise ParityError(
        f"{worst.output!r} differs by {worst.max_abs_diff:.3g} on a batch of {worst.batch} × {worst.length}, "
        f"and {parity.tolerance:.3g} is allowed. If that is only the dtype's rounding, raise "
        "`--tolerance`; otherwise report the model's class.",
        max_abs_diff=worst.max_abs_diff,
        tolerance=parity.tolerance,
        output=worst.output,
    )


def torch_runner(
    model: nn.Module, signature: Signature, prefix: Mapping[str, torch.Tensor] | None = None
) -> Runner:
    """The live model as a runner: in evaluation mode, in its own dtype, on its own device.

    Args:
        prefix: constant keys and values that a decoder reads first.
    """
    constant = prefix or {}

    def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
        device = next(model.parameters()).device
        with evaluating(model):
            wide = cache.behind(constant, as_torch(feeds, signature, device))
            found = cache.beyond(constant, call(model, wide))
        return {port.name: found[port.name].double().cpu().numpy() for port in signature.outputs}

    return run


def _rows(
    found: Mapping[str, Array], expected: Mapping[str, Array], feed: Mapping[str, Array], signature: Signature
) -> Iterator[Row]:
    first = feed[signature.inputs[0].name]
    batch, length = first.shape[0], first.shape[-1]
    mask = feed.get("attention_mask", np.ones((batch, length))).astype(bool)
    past = mask.shape[1] - length
    for port in signature.outputs:
        a, b = (np.asarray(side.get(port.name)).astype(np.float64) for side in (found, expected))
        if a.shape != b.shape:
            yield Row(port.name, batch, length, np.inf, np.inf, None, past)
            continue
        if port.token_axis is not None:
            a, b = (np.moveaxis(side, port.token_axis, 1) for side in (a, b))
        seen = fitted(mask, a) if port.per_token else mask
        gap = apart(a, b)[seen] if port.per_token else apart(a, b)
        top1, kl = _decided(a, b, port, seen)
        scale = _largest(b[seen] if port.per_token else b)
        yield Row(port.name, batch, length, float(gap.max()), float(gap.mean()), top1, past, kl, scale)


def _largest(values: Array) -> float:
    finite = np.abs(values[np.isfinite(values)])
    return float(finite.max()) if finite.size else 0.0


def fitted(mask: Array, output: Array) -> Array:
    """The mask for what comes out: virtual tokens in front, attended by every row, or only the last tokens."""
    more = output.shape[1] - mask.shape[1]
    return np.pad(mask, ((0, 0), (max(0, more), 0)), constant_values=True)[:, -output.shape[1] :]


def apart(a: Array, b: Array) -> Array:
    """|a − b|, infinite where exactly one side is finite or the sign of an infinity differs."""
    with np.errstate(invalid="ignore"):
        gap: Array = np.where(a == b, 0.0, np.abs(a - b))
    gap[np.isnan(gap)] = np.inf
    return gap


def _decided(a: Array, b: Array, port: Port, mask: Array) -> tuple[float | None, float | None]:
    """Top-1 agreement and divergence of scores; along the attended tokens where one of them is chosen."""
    if port.name not in SCORED or a.shape[-1] < 2:
        return None, None
    if len(port.axes) == 2 and port.per_token:
        a, b = np.where(mask, a, -np.inf), np.where(mask, b, -np.inf)
    elif port.per_token:
        a, b = a[mask], b[mask]
    return float((a.argmax(-1) == b.argmax(-1)).mean()), _divergence(a, b)


def _divergence(found: Array, expected: Array) -> float:
    """KL(expected ‖ found) of the softmax over the last axis, the mean over the others; infinite where not finite."""
    q, p = (torch.log_softmax(torch.from_numpy(side), -1) for side in (found, expected))
    apart = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1).mean()
    return float(apart.clamp(min=0)) if bool(apart.isfinite()) else float("inf")
