"""A chart of what was timed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from peftsurgery.errors import PlanError

if TYPE_CHECKING:
    from peftsurgery.commands.bench import Row

FORMATS = (".png", ".svg", ".pdf")


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


def plot_bars(file: Path, rows: Sequence[Row], title: str) -> None:
    """Median milliseconds of every contestant, a panel for each course and lap."""
    from matplotlib.figure import Figure

    panels: dict[tuple[int, int, str], list[Row]] = {}
    for row in rows:
        panels.setdefault((row.length, row.batch, row.lap), []).append(row)
    figure = Figure(figsize=(3 * min(3, len(panels)), 2.2 * -(-len(panels) // 3)), layout="constrained")
    figure.suptitle(title)
    for number, ((length, batch, lap), cells) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(-(-len(panels) // 3), min(3, len(panels)), number)
        bars = axes.barh([row.contestant for row in cells], [row.median for row in cells])
        axes.bar_label(bars, fmt="%.2f", padding=2)
        axes.invert_yaxis()
        axes.margins(x=0.25)
        axes.set_title(f"{lap}, {batch} × {length}", fontsize="medium")
        axes.set_xlabel("ms")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
