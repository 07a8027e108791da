"""Latency of our graphs in ONNX Runtime on the CPU, beside those of every other exporter, in turns.

python -m benchmarks.latency [--quick]

Two models: MiniLM, an encoder, and stories260k, a decoder with its cache: a prompt with an empty past, and one token
behind a past. Every graph has the same inputs and outputs and reads the same padded texts. The peers are torch's
exporter (attention written out or not, opset 20 and 24), transformers' exporter (also with its fusions) and
TorchScript, each as it is and after onnxruntime's offline optimiser; a session's own optimisations are all on.

All run first, a few rounds; the three fastest peers of each cell then run against ours, one run of each to a round.
A cell's ratio is of first quartiles, and the paired one the median over rounds. A cell is run again where the middle
half of ours spreads over more than a tenth. With one thread the process is bound to one CPU.

At the end what an adapter costs: a merged LoRA over its base, and a baked prompt over its base with as many tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import torch
import transformers
from rich.console import Console
from rich.table import Table

import peftsurgery as ps
from benchmarks.exporters import EXPORTERS, optimised
from fixtures.minilm import minilm_path
from peftsurgery.commands.operating import loaded
from peftsurgery.graph.inputs import batch
from peftsurgery.graph.signature import Signature, signature
from peftsurgery.timing import Times, timed, turns

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "latency.json"
PAGE = ROOT / "docs" / "speed.md"
BEGIN, END = "<!-- latency: begin -->", "<!-- latency: end -->"
OURS = {
    "ours": {},
    "ours, copied": {"weights": "inline"},
    "ours, opset 20": {"opset": 20},
}
BAR, NOISY, FINALISTS = 1.0, 0.1, 3
SECONDS, MOST, LEAST = 4.0, 200, 8
"""What the rounds of a cell may take, and how many there are."""


class Subject(NamedTuple):
    """A model, and what is run: rows, new tokens, tokens before them."""

    name: str
    path: Path
    task: str
    family: str
    cells: Sequence[tuple[int, int, int]]


GRID = [(rows, tokens, 0) for tokens in (16, 128, 512) for rows in (1, 8)]
STEPS = [(rows, 1, past) for past in (64, 256) for rows in (1, 8)]
SUBJECTS = (
    Subject("MiniLM", minilm_path(), "feature-extraction", "bert", GRID),
    Subject("stories260k", ROOT / "fixtures" / "stories260k", "text-generation", "gpt2", GRID + STEPS),
)
Sessions = Mapping[str, onnxruntime.InferenceSession]


def graphs(subject: Subject, room: Path, quick: bool) -> tuple[Signature, dict[str, Path], dict[str, str]]:
    """The files of all graphs by the names of their makers, and why others made none."""
    model = loaded(subject.path, [], subject.task, False).eval()
    said, files, lost = signature(model, subject.task), dict[str, Path](), dict[str, str]()
    for name, words in OURS.items():
        out = room / f"{len(files)}"
        ps.export_onnx(subject.path, out=out, task=subject.task, verify=False, **words)
        files[name] = out / "model.onnx"
    for name, export in list(EXPORTERS.items())[: 1 if quick else None]:
        file = room / f"{len(files)}.onnx"
        again = file.with_suffix(".optimised.onnx")
        config = model.config
        sizes = subject.family, config.num_attention_heads, config.hidden_size
        for word, make in (
            (name, partial(export, model, said, file)),
            (f"{name} +", partial(optimised, file, *sizes, again)),
        ):
            try:
                make()
                files[word] = again if word.endswith("+") else file
            except Exception as error:  # whatever an exporter's own code raises
                lost[word] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
    return said, files, lost


def opened(files: Mapping[str, Path], threads: int) -> tuple[dict[str, Any], dict[str, str]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    able, lost = {}, {}
    for name, file in files.items():
        try:
            able[name] = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors have no public base
            lost[name] = str(error).splitlines()[0][:160]
    return able, lost


def runs(sessions: Sessions, said: Signature, cell: tuple[int, int, int]) -> dict[str, Any]:
    """A run of each on one padded batch; who refuses it is left out."""
    rows, tokens, past = cell
    feeds = batch(np.random.default_rng(0), said, rows, tokens, past)
    able = {}
    for name, session in sessions.items():
        call = partial(
            session.run,
            None,
            {port.name: feeds[port.name] for port in session.get_inputs() if port.name in feeds},
        )
        try:
            call()
        except Exception:  # fused rotary embeddings that take one row alone, for one
            if name in OURS:
                raise
            continue
        able[name] = timed(call)
    return able


def first(found: dict[str, list[Times]]) -> dict[str, Times]:
    return {name: laps[0] for name, laps in found.items()}


def raced(
    able: Mapping[str, Any], quick: bool, names: Sequence[str] = ()
) -> tuple[dict[str, Times], list[str]]:
    """The times of ours and of the finalists, who are found out unless they are named."""
    known = [name for name in names if name in able]
    tried = {name: able[name] for name in (*OURS, *known)} if known else able
    shown = first(turns(tried, 2, warm_up=0))
    names = known or sorted((n for n in shown if n not in OURS), key=lambda n: shown[n].p25)[:FINALISTS]
    final = {name: able[name] for name in (*OURS, *names)}
    spent = sum(shown[name].median for name in final)
    rounds = 3 if quick else int(min(MOST, max(LEAST, SECONDS / spent)))
    for _ in range(2):
        found = first(turns(final, rounds, warm_up=1))
        if quick or found["ours"].iqr < NOISY:
            break
    return found, list(names)


def row(subject: str, cell: tuple[int, int, int], threads: int, found: Mapping[str, Times]) -> dict[str, Any]:
    peer = min((name for name in found if name not in OURS), key=lambda name: found[name].p25)
    return {
        "model": subject,
        "rows": cell[0],
        "tokens": cell[1],
        "past": cell[2],
        "threads": threads,
        "best_peer": peer,
        "ratio": {name: found[name].p25 / found[peer].p25 for name in OURS},
        "paired": {name: found[name].over(found[peer]) for name in OURS},
        "p25_ms": {name: times.p25 * 1e3 for name, times in found.items()},
        "iqr": {name: times.iqr for name, times in found.items()},
        "rounds": len(found["ours"].seconds),
    }


def measured(
    subject: Subject, room: Path, quick: bool, counts: Sequence[int]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    said, files, lost = graphs(subject, room, quick)
    cells = subject.cells[:1] if quick else subject.cells
    found, finalists = [], dict[tuple[int, int, int], list[str]]()
    for threads in counts:
        bind(threads)
        kept = {*OURS, *(name for names in finalists.values() for name in names)}
        sessions, refused = opened(
            {n: f for n, f in files.items() if threads == counts[0] or n in kept}, threads
        )
        lost.update(refused)
        for cell in cells:
            times, finalists[cell] = raced(runs(sessions, said, cell), quick, finalists.get(cell, ()))
            found.append(row(subject.name, cell, threads, times))
            print(line(found[-1]), flush=True)
    return found, lost


def bind(threads: int) -> None:
    """To one CPU for one thread, the last one, where the system's own work seldom is; to all for more."""
    here = sorted(range(os.cpu_count() or 1))
    os.sched_setaffinity(0, {here[-1]} if threads == 1 else set(here))


def adapters(room: Path, quick: bool) -> Iterator[dict[str, Any]]:
    """A merged LoRA over its base, and a baked prompt over its base with as many tokens more."""
    bind(1)
    base, task = minilm_path(), "seq-cls"
    made = {"lora": "minilm_lora", "prompt": "minilm_prompt"}
    for name, fixture in made.items():
        ps.export_onnx(base, adapters=[ROOT / "fixtures" / fixture], task=task, out=room / name, verify=False)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    model.save_pretrained(room / "headed")
    ps.export_onnx(room / "headed", task=task, out=room / "base", verify=False)
    said = signature(model)
    sessions, _ = opened({name: room / name / "model.onnx" for name in (*made, "base")}, 1)
    count = ps.load_adapter(ROOT / "fixtures" / made["prompt"]).plan.steps[0].method.num_virtual_tokens
    for rows, tokens in ((1, 16), (1, 128), (8, 128))[: 1 if quick else None]:
        for name, more in (("lora", 0), ("prompt", count)):
            pair = {
                name: runs({"ours": sessions[name]}, said, (rows, tokens, 0))["ours"],
                "base": runs({"ours": sessions["base"]}, said, (rows, tokens + more, 0))["ours"],
            }
            found = first(turns(pair, 3 if quick else 40, warm_up=2))
            yield {
                "adapter": name,
                "rows": rows,
                "tokens": tokens,
                "base_tokens": tokens + more,
                "ratio": found[name].p25 / found["base"].p25,
                "paired": found[name].over(found["base"]),
                "iqr": found[name].iqr,
            }


def line(one: Mapping[str, Any]) -> str:
    ratios = " · ".join(f"{one['ratio'][name]:.3f}" for name in OURS)
    what = f"{one['model']} {one['rows']} × {one['tokens']}" + (
        f" after {one['past']}" if one["past"] else ""
    )
    return f"{what}, {one['threads']} thread(s): {ratios} of {one['best_peer']}"


def rendered(results: Mapping[str, Any]) -> str:
    """The tables in Markdown, from what `latency.json` holds."""
    head = ("model", "rows × tokens", "threads", "best peer", "its p25 ms", *OURS, "noise")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for one in results["rows"]:
        cell = f"{one['rows']} × {one['tokens']}" + (f" after {one['past']}" if one["past"] else "")
        figures = [f"{one['ratio'][name]:.3f} ({one['paired'][name]:.3f})" for name in OURS]
        peer = f"{one['p25_ms'][one['best_peer']]:.2f}"
        cells = (
            one["model"],
            cell,
            str(one["threads"]),
            one["best_peer"],
            peer,
            *figures,
            f"{one['iqr']['ours']:.0%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    more = ["| adapter | rows × tokens | base's tokens | ratio (paired) |", "|---" * 4 + "|"]
    for one in results["adapters"]:
        cell = f"{one['rows']} × {one['tokens']}"
        figures = f"{one['ratio']:.3f} ({one['paired']:.3f})"
        more.append(f"| {one['adapter']} | {cell} | {one['base_tokens']} | {figures} |")
    setting = ", ".join(f"{name} {value}" for name, value in results["setting"].items())
    return "\n\n".join(["\n".join(lines), verdict(results["rows"]), "\n".join(more), f"With {setting}."])


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many cells each form of ours wins, and by how much it loses where it does."""
    words = []
    for name in OURS:
        ratios = [one["ratio"][name] for one in rows]
        met = sum(ratio <= BAR for ratio in ratios)
        words.append(
            f"{name}: {met} of {len(ratios)} cells at {BAR:.1f} or below, the highest {max(ratios):.3f}"
        )
    return "; ".join(words) + "."


def placed(page: str, tables: str) -> str:
    """The page with the tables between its two comments."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{rest.split(END)[1]}"


def show(results: Mapping[str, Any]) -> None:
    table = Table(title="Latency over the best peer's, of first quartiles; the bar is 1.0")
    for column in ("model", "rows × tokens", "past", "threads", "best peer", *OURS, "IQR", "verdict"):
        table.add_column(column)
    for one in results["rows"]:
        best = min(one["ratio"].values())
        word = "met" if one["ratio"]["ours"] <= BAR else "met by another form" if best <= BAR else "missed"
        table.add_row(
            one["model"],
            f"{one['rows']} × {one['tokens']}",
            str(one["past"]),
            str(one["threads"]),
            one["best_peer"],
            *(f"{one['ratio'][name]:.3f}" for name in OURS),
            f"{one['iqr']['ours']:.0%}",
            word,
        )
    console = Console(width=150)
    console.print(table)
    console.print(verdict(results["rows"]))


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    words.add_argument(
        "--quick", action="store_true", help="one peer and one cell, to see that all works; nothing is kept"
    )
    words.add_argument("--threads", default="1,2", help="how many ONNX Runtime has, in turn")
    asked = words.parse_args()
    quick, counts = asked.quick, [int(word) for word in asked.threads.split(",")]
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows, lost = [], {}
    with tempfile.TemporaryDirectory(prefix="latency-", dir="/var/tmp") as place:
        for subject in SUBJECTS:
            room = Path(place) / subject.name
            room.mkdir()
            found, unable = measured(subject, room, quick, counts)
            rows += found
            lost.update({f"{subject.name}, {name}": why for name, why in unable.items()})
        worn = list(adapters(Path(place), quick))
    setting = {name: version(name) for name in ("torch", "transformers", "onnxruntime-gpu", "onnxscript")}
    results = {
        "setting": {**setting, "CPUs": os.cpu_count()},
        "rows": rows,
        "adapters": worn,
        "left_out": lost,
    }
    show(results)
    shown = rendered(results)
    if not quick:
        RESULTS.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        PAGE.write_text(placed(PAGE.read_text(encoding="utf-8"), shown), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
