"""Turns: one run of each to a round, the first rounds not counted, ratios taken round by round."""

from __future__ import annotations

import pytest

from peftsurgery.timing import Times, timed, turns


def test_they_take_turns() -> None:
    seen: list[str] = []
    clock = iter(range(1000))

    def run(name: str) -> object:
        return timed(lambda: seen.append(name), lambda: float(next(clock)))

    found = turns({"a": run("a"), "b": run("b")}, 3, warm_up=1)
    assert seen == ["a", "b"] * 4
    assert found["a"] == [Times((1.0, 1.0, 1.0))]


def test_figures() -> None:
    ours, theirs = Times((1.0, 2.0, 3.0, 4.0, 5.0)), Times((2.0, 4.0, 6.0, 8.0, 100.0))
    assert (ours.p25, ours.median) == (2.0, 3.0)
    assert ours.iqr == pytest.approx(2 / 3)
    assert theirs.over(ours) == 2.0
