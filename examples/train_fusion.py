"""Train two adapters on two tasks, fuse them on a third, and see which one every layer listens to.

python -m examples.train_fusion --steps 200 --out build/fusion --seed 0

Stage 1: one bottleneck adapter learns complaints in pros and cons, another the polarity of film reviews.
Stage 2: base and adapters rest, and AdapterFusion learns complaints in reviews of products; the baseline is the
head alone there.
Exits 1 if the fusion does not beat the baseline, or if ONNX Runtime and torch do not agree.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

import peftsurgery as ps
from examples.classify import TOLERANCE, load, table
from examples.train_soft_prompts import LABELS, TEXTS, accuracy, batches, encoded, sentences, shuffled
from fixtures.minilm import minilm_path
from peftsurgery.method import Map, Params

PICTURE = Path(__file__).parents[1] / "docs" / "fusion_listening.png"
FIRST = {"complaints": "pros_cons", "polarity": "sentence_polarity"}
THIRD, FUSION, BASELINE = "product_complaints", "both", "head only"
RATES = {"adapter": 1e-3, "fusion": 5e-4, "head": 1e-2}
HEARD: list[Tensor] = []


@dataclass(frozen=True)
class Overheard(ps.AdapterFusion):
    """A fusion that notes down, for every call, how much each adapter is listened to: (…, members)."""

    def forward(self, y: Tensor, residual: Tensor, norm: Map | None, p: Params, training: bool) -> Tensor:
        HEARD.append(self.weights(y, residual, norm, p))
        return super().forward(y, residual, norm, p, training)


def base(seed: int) -> nn.Module:
    """The frozen MiniLM with a fresh head; all heads start alike."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(minilm_path(), num_labels=len(LABELS))
    model.requires_grad_(False).classifier.requires_grad_(True)
    return model


def trained(
    model: nn.Module, parameters: dict[str, nn.Parameter], rows: list[Any], steps: int, seed: int
) -> Iterator[float]:
    """AdamW, its rates falling along a cosine; the loss of every step."""
    kind = "fusion" if FUSION in ps.adapters(model) else "adapter"
    rates = {name: RATES["head" if name.startswith("classifier") else kind] for name in parameters}
    groups = [{"params": [p], "lr": rates[name]} for name, p in parameters.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for inputs, labels in islice(shuffled(rows, seed), steps):
        loss = cross_entropy(model.train()(**inputs).logits, labels) + ps.regularization(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield loss.item()


def learn(
    name: str, data: str, model: nn.Module, steps: int, seed: int, progress: Progress
) -> tuple[str, str, float, float]:
    """Train what requires gradients; (name, data, accuracy on the test sentences, seconds)."""
    began = perf_counter()
    own = ps.trainable_parameters(model) or dict(model.classifier.named_parameters("classifier"))
    losses = trained(model, own, sentences("train", data), steps, seed)
    for _ in progress.track(losses, total=steps, description=name):
        pass
    return name, data, accuracy(model, sentences("test", data)), perf_counter() - began


def taken(model: nn.Module, name: str) -> ps.Adapter:
    adapter = ps.remove(model, name)
    assert isinstance(adapter, ps.Adapter)
    return adapter


@torch.inference_mode()
def listened(model: nn.Module, adapter: ps.Adapter) -> np.ndarray:
    """The mean weight of each member at each layer, over the words of the test sentences: (layers, members)."""
    steps = tuple(replace(step, method=_overheard(step.method)) for step in adapter.plan.steps)
    ps.inject(model, replace(adapter, plan=replace(adapter.plan, steps=steps)))
    model.eval()
    sums, words = np.zeros((len(steps), len(FIRST))), 0
    for inputs, _ in batches(sentences("test", THIRD), 64):
        HEARD.clear()
        model(**inputs)
        seen = inputs["attention_mask"].bool()
        sums += np.array([weights[seen].sum(0).numpy() for weights in HEARD])
        words += int(seen.sum())
    ps.remove(model, adapter.name)
    return sums / words


def _overheard(method: ps.AdapterFusion) -> Overheard:
    return Overheard(**{field.name: getattr(method, field.name) for field in fields(method)})


def drawn(weights: np.ndarray) -> None:
    figure = Figure(figsize=(5, 4.4), dpi=110, layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(weights, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for (layer, member), value in np.ndenumerate(weights):
        axes.text(member, layer, f"{value:.2f}", ha="center", va="center", color="w" if value < 0.6 else "k")
    axes.set(title="Which adapter each layer listens to", ylabel="layer", xticks=range(len(FIRST)))
    axes.set_xticklabels(FIRST)
    figure.colorbar(picture, label="mean fusion weight")
    figure.savefig(PICTURE)


def served(model: nn.Module, out: Path, console: Console) -> bool:
    """Export the fused model, and classify with ONNX Runtime alone: whether it gives torch's logits."""
    with torch.inference_mode():
        expected = model.eval()(**encoded(TEXTS)).logits.numpy()
    ps.export_onnx(minilm_path(), adapters=taken(model, FUSION), out=out / "onnx")
    found = load(out / "onnx").logits(TEXTS)
    gap = float(np.abs(found - expected).max())
    console.print(f"{out}/onnx, served by ONNX Runtime: {gap:.1e} from torch's logits at most.")
    console.print(table(TEXTS, found, LABELS))
    return gap <= TOLERANCE


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="of every training")
    parser.add_argument("--out", type=Path, default=Path("build/fusion"), help="for the graph")
    parser.add_argument("--seed", type=int, default=0)
    said = parser.parse_args()
    if said.steps < 1 or (said.out / "onnx").exists():
        parser.error(f"needs --steps of 1 or more, and no {said.out / 'onnx'}")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console, config = Console(), ps.CONFIGS["pfeiffer"]
    method = replace(config.method, reduction_factor=8)
    rows, members = [], []
    with Progress(console=console) as progress:
        for name, data in FIRST.items():
            model = ps.inject(base(said.seed), method, config.targets, name=name, seed=said.seed)
            rows.append(learn(name, data, model, said.steps, said.seed, progress))
            members.append(taken(model, name))
        rows.append(learn(BASELINE, THIRD, base(said.seed), said.steps, said.seed, progress))
        fused = ps.inject(base(said.seed), ps.AdapterFusion(), adapters=members, name=FUSION, seed=said.seed)
        rows.append(learn("fusion", THIRD, fused, said.steps, said.seed, progress))
    shown = Table("trained", "on", "accuracy", "seconds", box=SIMPLE_HEAD)
    for name, data, score, seconds in rows:
        shown.add_row(name, data, f"{score:.1%}", f"{seconds:.0f}")
    console.print(shown)
    adapter = taken(fused, FUSION)
    weights = listened(fused, adapter)
    drawn(weights)
    console.print(f"Which adapter each layer listens to: {PICTURE.name}\n{weights.round(2)}")
    ps.inject(fused, adapter)
    good = [served(fused, said.out, console), rows[-1][2] > rows[-2][2]]
    if not all(good):
        console.print("[red]The fusion does not beat the head alone, or its graph is not what was trained.")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
