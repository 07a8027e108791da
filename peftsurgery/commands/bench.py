"""bench: how fast an export reads, sees and writes, beside torch and the graph of torch's own exporter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from peftsurgery.adapter import Adapter
from peftsurgery.commands.adapter_files import Adapters, gather
from peftsurgery.commands.contestants import OURS, Contestants, Course, Sessions, contestants, shape, tried
from peftsurgery.commands.operating import operated
from peftsurgery.commands.plotting import bars, check_plot, plot_bars
from peftsurgery.commands.report import Report
from peftsurgery.commands.sides import config_of, graphs_of
from peftsurgery.commands.words import whole_numbers
from peftsurgery.errors import ExportError, PlanError
from peftsurgery.events import Event, Listener, ignore
from peftsurgery.timing import Times, turns

if TYPE_CHECKING:
    from torch import nn

    from peftsurgery.graph.signature import Signature

READING, WRITING = "reading", "writing"
"""The laps: texts or images at once (an encoder's whole work), and a token a step behind texts."""


class Row(NamedTuple):
    """One contestant's time for one lap of one course.

    Args:
        length: tokens of a row; None of images.
        p25, median: milliseconds.
        iqr: from the first quartile to the third, as a share of the median.
        per_second: tokens, or images, in the median.
        over_ours: the median of its time over ours in the same round.
    """

    batch: int
    length: int | None
    lap: str
    contestant: str
    p25: float
    median: float
    iqr: float
    per_second: float
    over_ours: float

    @property
    def shape(self) -> str:
        """The course, in words."""
        return shape(self.batch, self.length)


def bench(
    model: str | Path,
    *,
    against: nn.Module | str | Path | None = None,
    adapters: Adapters = (),
    weight: Sequence[float] = (),
    task: str | None = None,
    batch: str | Sequence[int] = (1, 8),
    length: str | Sequence[int] = (16, 128, 512),
    new_tokens: int = 16,
    runs: int = 20,
    providers: Sequence[str] = (),
    threads: int = 0,
    cuda_graph: bool = False,
    plot: str | Path | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    listen: Listener = ignore,
) -> Report:
    """Time an export: reading texts or seeing images, and, where it writes, writing a token a step with its cache.

    Beside the model of `against` in torch, compiled by torch, and as the graph of torch's own exporter, they run in
    turns, one run of each to a round, so that what slows the machine down slows all. Who cannot run is left out with
    a word. A decoder gives the logits of every token, as all of them do here.

    Args:
        model: the directory of an export, or an `.onnx` file in one.
        against: a live module or a model directory; without it the export is timed alone.
        adapters: merged into `against` first, where they can be.
        weight: a factor for each adapter's effect.
        task: the task of `against`, where its checkpoint does not say it; the export's by default.
        batch: rows of the texts, `1,8` or numbers; every row but the first is padded; or images, of the model's size.
        length: tokens of a row; what the model has no positions for is left out.
        new_tokens: how many tokens are written behind each text.
        runs: rounds that count, two at least; two more go before.
        providers: where graphs run, best first: `cuda`, `cpu`.
        threads: of one operation, in ONNX Runtime and in torch; 0: as many as they choose.
        cuda_graph: let CUDA replay a run of the graphs as one, where they have no cache: one for each batch and length.
        plot: a file for a bar chart, `.png`, `.svg` or `.pdf`; matplotlib draws it.

    Raises:
        ExportError: there is no graph, or ONNX Runtime refuses it.
        PlanError: a number makes no sense, or matplotlib is not there.
        UnsupportedModel, AdapterError, CheckpointError.
    """
    batches, lengths = whole_numbers(batch, "batch"), whole_numbers(length, "length")
    _check(runs, new_tokens, threads)
    check_plot(plot)
    given = _worn(adapters, weight, against, allow_pickle)
    settings = Sessions(providers, threads, cuda_graph)
    ours, said = _opened(model, settings)
    fit, unfit = _fitting(said, lengths, new_tokens)
    with (
        _live(against, given, task or said.task or None, trust_remote_code, threads) as live,
        contestants(ours, live, said, settings) as field,
    ):
        courses = [Course(said, rows, columns, new_tokens) for columns in fit for rows in batches]
        found, lost = _raced(field, courses, runs, listen)
    if plot is not None:
        plot_bars(Path(plot), found, str(model))
    facts = _facts(model, against, ours.provider, threads, runs)
    return _report({**facts, "left_out": _left_out(unfit, {**field.unable, **lost})}, found)


def _facts(
    model: str | Path, against: nn.Module | str | Path | None, provider: str, threads: int, runs: int
) -> dict[str, Any]:
    return {
        "model": str(model),
        "against": _name(against),
        "provider": provider,
        "threads": threads or "chosen by the libraries",
        "runs": runs,
    }


def _worn(adapters: Adapters, weight: Sequence[float], against: object, allow_pickle: bool) -> list[Adapter]:
    given = gather(adapters, weight, allow_pickle=allow_pickle) if adapters else []
    if given and against is None:
        raise PlanError(
            "An adapter goes on the model of `--against`, and there is none. Name it, or leave it out."
        )
    return given


def _check(runs: int, new_tokens: int, threads: int) -> None:
    if runs < 2 or new_tokens < 1 or threads < 0:
        raise PlanError(
            f"runs is {runs}, new_tokens {new_tokens} and threads {threads}. "
            "Name 2 runs, 1 token and 0 threads, or more."
        )


def _left_out(lengths: Sequence[int], unable: Mapping[str, str]) -> list[str]:
    return [f"length {n}: no positions" for n in lengths] + [f"{n}: {why}" for n, why in unable.items()]


def _opened(model: str | Path, settings: Sessions) -> tuple[Any, Signature]:
    files = graphs_of(model)
    if not files:
        raise ExportError(f"{model} holds no model.onnx. Name the directory of an export.")
    session = settings.open(files)
    said: Signature = session.signature(config_of(files[0].parent))
    return session, said


def _fitting(said: Signature, lengths: Sequence[int], new_tokens: int) -> tuple[list[int], list[int]]:
    """The lengths that the model has positions for, with what is written behind them, and the others."""
    from peftsurgery.graph.signature import GENERATION

    if said.sees:
        return [1], []
    behind = new_tokens + 1 if said.task == GENERATION else 0
    fit = [n for n in lengths if not said.longest or n + behind <= said.longest]
    if not fit:
        raise PlanError(
            f"The model has positions for {said.longest} tokens, and with the {behind} written behind them the "
            f"shortest text has {min(lengths) + behind}. Name a shorter `--length`."
        )
    return fit, [n for n in lengths if n not in fit]


@contextmanager
def _live(
    against: nn.Module | str | Path | None, given: list[Any], task: str | None, trust: bool, threads: int
) -> Iterator[nn.Module | None]:
    """The model in torch, in evaluation, with as many threads as graphs have."""
    if against is None:
        yield None
        return
    import torch

    from peftsurgery.graph.posture import evaluating

    before = torch.get_num_threads()
    with operated(against, given, False, task, trust) as live, evaluating(live):
        torch.set_num_threads(threads or before)
        try:
            yield live
        finally:
            torch.set_num_threads(before)


def _raced(
    field: Contestants, courses: Sequence[Course], runs: int, listen: Listener
) -> tuple[list[Row], dict[str, str]]:
    found, lost = list[Row](), dict[str, str]()
    for done, course in enumerate(courses):
        listen(Event("bench", shape(course.batch, course.tokens), done, len(courses)))
        able, unable = tried({n: c for n, c in field.able.items() if n not in lost}, course)
        lost.update(unable)
        found += _rows(course, turns(able, runs))
    listen(Event("bench", "done", len(courses), len(courses)))
    return found, lost


def _rows(course: Course, times: dict[str, list[Times]]) -> Iterator[Row]:
    tokens = (course.batch * course.length, course.batch * course.new_tokens)
    for at, lap in enumerate((READING, WRITING)[: len(times[OURS])]):
        for name, laps in times.items():
            one = laps[at]
            yield Row(
                course.batch,
                course.tokens,
                lap,
                name,
                one.p25 * 1e3,
                one.median * 1e3,
                one.iqr,
                tokens[at] / one.median,
                one.over(times[OURS][at]),
            )


def _name(against: nn.Module | str | Path | None) -> str:
    """What to call it; nothing where there is none."""
    if against is None:
        return ""
    return str(against) if isinstance(against, str | Path) else type(against).__name__


def _report(facts: Mapping[str, Any], found: Sequence[Row]) -> Report:
    others = [row for row in found if row.contestant != OURS]
    ahead = sum(row.over_ours >= 1 for row in others)
    headline = (
        f"Ours is as fast or faster in {ahead} of {len(others)} comparisons."
        if others
        else f"{len(found)} timings, with nothing to compare them with."
    )
    noise = f"half of the runs are within {max(row.iqr for row in found):.0%} of the median, at worst"
    rows = [row._asdict() for row in found]
    return Report("bench", headline, {**facts, "noise": noise, "rows": rows}, _table(found))


def _table(found: Sequence[Row]) -> list[tuple[str, ...]]:
    counted = "images/s" if found[0].length is None else "tokens/s"
    head = ("batch × length", "lap", "who", "p25 ms", "median ms", "IQR", counted, "over ours", "")
    return [
        head,
        *(
            (
                row.shape,
                row.lap,
                row.contestant,
                f"{row.p25:.2f}",
                f"{row.median:.2f}",
                f"{row.iqr:.0%}",
                f"{row.per_second:.0f}",
                f"{row.over_ours:.2f}",
                bar,
            )
            for row, bar in zip(found, bars(found), strict=True)
        ),
    ]
