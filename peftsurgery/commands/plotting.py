"""Charts of what was timed: in a file, and in the cells of a table."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from peftsurgery.errors import PlanError

if TYPE_CHECKING:
    from peftsurgery.commands.bench import Row

FORMATS = (".png", ".svg", ".pdf")
BLOCK, WIDTH = "█", 16
"""A bar in a table, and the longest there."""


def check_plot(plot: str | Path | None) -> None:
    """Find out before anything is timed whether the chart can be drawn.

    Raises:
        PlanError: it has another format, or matplotlib is not installed.
    """
    if plot is None:
        return
    if Path(plot).suffix not in FORMATS:
        raise PlanError(f"{plot} is no file for a chart. Name one that ends in .png, .svg or .pdf.")
    if find_spec("matplotlib") is None:
        raise PlanError(
            "matplotlib draws the chart, and is not installed. Install it (`pip install 'peftsurgery[plot]'`), "
            "or leave out `--plot`."
        )


def bars(rows: Sequence[Row]) -> list[str]:
    """For each row a bar as long as its median, beside the longest of its course and lap."""
    longest = {key: max(row.median for row in cells) for key, cells in _courses(rows).items()}
    return [BLOCK * max(1, round(WIDTH * row.median / longest[row.shape, row.lap])) for row in rows]


def _courses(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Those that are compared with one another, by course and lap."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.shape, row.lap), []).append(row)
    return found


def plot_bars(file: Path, rows: Sequence[Row], title: str) -> None:
    """Median milliseconds of every contestant, a panel for each course and lap."""
    from matplotlib.figure import Figure

    panels = _courses(rows)
    figure = Figure(figsize=(3 * min(3, len(panels)), 2.2 * -(-len(panels) // 3)), layout="constrained")
    figure.suptitle(title)
    for number, ((shape, lap), cells) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(-(-len(panels) // 3), min(3, len(panels)), number)
        bars = axes.barh([row.contestant for row in cells], [row.median for row in cells])
        axes.bar_label(bars, fmt="%.2f", padding=2)
        axes.invert_yaxis()
        axes.margins(x=0.25)
        axes.set_title(f"{lap}, {shape}", fontsize="medium")
        axes.set_xlabel("ms")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
