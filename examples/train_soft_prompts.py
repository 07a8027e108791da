"""Train soft prompts on real sentences: from a frozen MiniLM to classifiers that ONNX Runtime serves.

python -m examples.train_soft_prompts --steps 240 --out build/soft --seed 0

Complaint or not: prompt tuning and prefix tuning train with the classifier head, the baseline is the head alone.
Exits 1 if a soft prompt does not beat the baseline, or if ONNX Runtime and torch do not agree.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

import peftsurgery as ps
from examples.classify import TOLERANCE, load, table
from fixtures.minilm import minilm_path

HERE = Path(__file__).parent
PICTURE = HERE.parent / "docs" / "soft_prompts_learning.png"
LABELS, SETS = ("fine", "complaint"), ("pros_cons", "product_complaints")
BASELINE = "head only"
METHODS: dict[str, ps.PromptTuning | ps.PrefixTuning | None] = {
    BASELINE: None,
    "prompt tuning": ps.PromptTuning(num_virtual_tokens=20, prompt_tuning_init="SAMPLE_VOCAB"),
    "prefix tuning": ps.PrefixTuning(num_virtual_tokens=20, prefix_projection=True),
}
# Learning rates of the virtual tokens and of the head.
RATES = {BASELINE: (0.0, 3e-2), "prompt tuning": (1e-2, 1e-2), "prefix tuning": (1e-3, 1e-2)}
BATCH, POOL, LONGEST, EVERY, SMOOTH = 16, 8, 48, 60, 20
TEXTS = (HERE / "sentences.txt").read_text(encoding="utf-8").splitlines()[:5]
pretrained = cache(AutoTokenizer.from_pretrained)
Sentence = tuple[str, int]
Batch = tuple[dict[str, Tensor], Tensor]


@dataclass(slots=True)
class Run:
    name: str
    model: nn.Module
    losses: list[float] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)  # (step, accuracy)
    scores: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


def sentences(split: str, *names: str) -> list[Sentence]:
    """(text, label) of the named sets; label 1 is a complaint."""
    files = [HERE / "data" / name / f"{split}.tsv" for name in names]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").split("\n")[1:] if line]
    return [(text, int(label)) for text, _, label in (line.rpartition("\t") for line in lines)]


def encoded(texts: list[str]) -> dict[str, Tensor]:
    tokenizer = pretrained(minilm_path())
    return dict(tokenizer(texts, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"))


def batches(rows: list[Sentence], size: int) -> list[Batch]:
    """Batches of sentences of like length, so that little is padding."""
    rows = sorted(rows, key=lambda row: len(row[0]))
    cuts = [rows[at : at + size] for at in range(0, len(rows), size)]
    return [(encoded([text for text, _ in cut]), torch.tensor([label for _, label in cut])) for cut in cuts]


def shuffled(rows: list[Sentence], seed: int) -> Iterator[Batch]:
    """Random batches without end; every method sees the same ones in the same order."""
    draw = random.Random(seed)
    while True:
        pool = batches(draw.sample(rows, POOL * BATCH), BATCH)
        yield from draw.sample(pool, POOL)


@torch.inference_mode()
def accuracy(model: nn.Module, rows: list[Sentence]) -> float:
    model.eval()
    right = [model(**inputs).logits.argmax(-1) == labels for inputs, labels in batches(rows, 64)]
    return float(torch.cat(right).float().mean())


def tested(model: nn.Module) -> dict[str, float]:
    """The accuracy on each test set, and on both together."""
    tests = [sentences("test", name) for name in SETS]
    scores = [accuracy(model, test) for test in tests]
    both = np.average(scores, weights=[len(test) for test in tests])
    return dict(zip(SETS, scores, strict=True)) | {"both": float(both)}


def prepared(name: str, seed: int) -> tuple[nn.Module, list[dict[str, Any]]]:
    """The frozen base with a fresh head and the method on it, and what trains; the heads start alike."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(minilm_path(), num_labels=len(LABELS))
    model.requires_grad_(False).classifier.requires_grad_(True)
    trained, (rate, head_rate) = dict(model.classifier.named_parameters("classifier")), RATES[name]
    if method := METHODS[name]:
        ps.inject(model, method, seed=seed)
        trained = ps.trainable_parameters(model)
    rates = {word: head_rate if word.startswith("classifier.") else rate for word in trained}
    return model, [{"params": [trained[word]], "lr": rates[word]} for word in trained]


def train(name: str, steps: int, seed: int, progress: Progress) -> Run:
    """AdamW, its rates falling along a cosine; every EVERY steps a look at the test sentences."""
    model, groups = prepared(name, seed)
    run, bar, began = Run(name, model), progress.add_task(name, total=steps, loss=""), perf_counter()
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step, (inputs, labels) in enumerate(islice(shuffled(sentences("train", *SETS), seed), steps)):
        if step % EVERY == 0:
            run.curve.append((step, tested(model)["both"]))
        loss = cross_entropy(model.train()(**inputs).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        run.losses.append(loss.item())
        progress.update(bar, advance=1, loss=f"loss {np.mean(run.losses[-SMOOTH:]):.3f}")
    run.scores, run.seconds = tested(model), perf_counter() - began
    run.curve.append((steps, run.scores["both"]))
    return run


def drawn(runs: list[Run]) -> None:
    figure = Figure(figsize=(10, 4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    for run, colour in zip(runs, ("#7f7f7f", "#1f77b4", "#d95f02"), strict=True):
        smooth = np.convolve(run.losses, np.full(SMOOTH, 1 / SMOOTH), mode="valid")
        left.plot(np.arange(len(smooth)) + SMOOTH, smooth, color=colour, label=run.name)
        right.plot(*zip(*run.curve, strict=True), color=colour, marker="o", markersize=4, label=run.name)
    left.set(title=f"Training loss, mean of {SMOOTH} steps", xlabel="step", ylabel="cross-entropy")
    right.set(title="Accuracy on the test sentences", xlabel="step", ylabel="accuracy")
    right.legend(frameon=False, loc="lower right")
    figure.savefig(PICTURE)


def served(run: Run, out: Path, console: Console) -> bool:
    """Save, bake, export, and classify with ONNX Runtime alone: whether it gives torch's logits."""
    with torch.inference_mode():
        expected = run.model.eval()(**encoded(TEXTS)).logits.numpy()
    adapter = ps.remove(run.model)
    assert isinstance(adapter, ps.Adapter)
    ps.save_adapter(adapter, out / "adapter")
    ps.bake(out / "adapter", out=out / "baked", base=minilm_path())
    ps.export_onnx(minilm_path(), adapters=out / "baked", out=out / "onnx")
    found = load(out / "onnx").logits(TEXTS)
    gap = float(np.abs(found - expected).max())
    console.print(f"{out}/onnx, served by ONNX Runtime: {gap:.1e} from torch's logits at most.")
    console.print(table(TEXTS, found, LABELS))
    return gap <= TOLERANCE


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=240, help=f"for each method; at least {SMOOTH}")
    parser.add_argument("--out", type=Path, default=Path("build/soft"), help="for adapters and graphs")
    parser.add_argument("--seed", type=int, default=0)
    said = parser.parse_args()
    outs = {name: said.out / name.replace(" ", "-") for name in METHODS if name != BASELINE}
    if said.steps < SMOOTH or any(out.exists() for out in outs.values()):
        parser.error(f"needs --steps {SMOOTH} or more, and none of {[str(out) for out in outs.values()]}")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console()
    loss = TextColumn("{task.fields[loss]}")
    with Progress(*Progress.get_default_columns(), loss, console=console) as progress:
        runs = [train(name, said.steps, said.seed, progress) for name in METHODS]
    shown = Table("trained", *SETS, "both", "seconds", box=SIMPLE_HEAD)
    for run in runs:
        shown.add_row(run.name, *(f"{score:.1%}" for score in run.scores.values()), f"{run.seconds:.0f}")
    console.print(shown)
    drawn(runs)
    agree = [served(run, outs[run.name], console) for run in runs[1:]]
    better = [run.scores["both"] > runs[0].scores["both"] for run in runs[1:]]
    if not all(agree + better):
        console.print("[red]A soft prompt does not beat the baseline, or its graph is not what was trained.")
    return 0 if all(agree + better) else 1


if __name__ == "__main__":
    sys.exit(main())
