"""Several ways of doing one thing, timed in turns, so that what slows the machine down slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Laps = Sequence[float]
"""Seconds of the parts of one run."""
Run = Callable[[], Laps]


@dataclass(frozen=True, slots=True)
class Times:
    """What one contestant took, in seconds, round by round.

    Args:
        seconds: two rounds at least.
    """

    seconds: tuple[float, ...]

    @property
    def p25(self) -> float:
        """The first quartile: what it takes where nothing comes in between."""
        return self._quartiles()[0]

    @property
    def median(self) -> float:
        return self._quartiles()[1]

    @property
    def iqr(self) -> float:
        """From the first quartile to the third, as a share of the median: how noisy the machine was."""
        low, middle, high = self._quartiles()
        return (high - low) / middle

    def over(self, other: Times) -> float:
        """The median of this one's seconds over the other's in the same round."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))

    def _quartiles(self) -> list[float]:
        return statistics.quantiles(self.seconds, n=4, method="inclusive")


def timed(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> Run:
    """A run of one lap: a call."""

    def run() -> Laps:
        start = clock()
        call()
        return (clock() - start,)

    return run


def turns(runs: Mapping[str, Run], rounds: int, *, warm_up: int = 2) -> dict[str, list[Times]]:
    """For every contestant its times, lap by lap; a round is one run of each, A B C A B C.

    Args:
        rounds: how many count, two at least.
        warm_up: how many go before and do not.
    """
    found: dict[str, list[Laps]] = {name: [] for name in runs}
    for number in range(warm_up + rounds):
        for name, run in runs.items():
            laps = run()
            if number >= warm_up:
                found[name].append(laps)
    return {name: [Times(lap) for lap in zip(*laps, strict=True)] for name, laps in found.items()}
