"""Classify sentences with an exported ONNX model: all that a service needs of it.

python examples/classify.py ONNX_DIR "The battery died after two days." "Works like a charm."
python examples/classify.py ONNX_DIR --file sentences.txt --labels fine,complaint
python examples/classify.py ONNX_DIR --golden fixtures/minilm_lora/golden.npz
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer

TOLERANCE = 1e-4
"""The largest difference of a logit that `--golden` accepts; float32 sums in another order differ by 1e-6."""

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Classifier:
    """A session, its tokenizer and the names of its classes."""

    session: ort.InferenceSession
    tokenizer: Tokenizer
    labels: tuple[str, ...]

    def logits(self, texts: list[str]) -> Array:
        """(batch, classes) for a batch of texts, padded to the longest one."""
        rows = self.tokenizer.encode_batch(texts)
        offered = {
            "input_ids": [row.ids for row in rows],
            "attention_mask": [row.attention_mask for row in rows],
            "token_type_ids": [row.type_ids for row in rows],
        }
        wanted = [value.name for value in self.session.get_inputs()]
        batch = {name: np.array(offered[name], dtype=np.int64) for name in wanted}
        return np.asarray(self.session.run(["logits"], batch)[0])


def load(directory: Path) -> Classifier:
    """Everything from the exported directory: the model, the tokenizer, the labels of config.json."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_padding(pad_id=config.get("pad_token_id") or 0)
    session = ort.InferenceSession(directory / "model.onnx", providers=["CPUExecutionProvider"])
    # Less than the model's positions where virtual tokens take some of them.
    longest = int(session.get_modelmeta().custom_metadata_map["peftsurgery.longest"])
    if longest:  # 0 says that there is no bound
        tokenizer.enable_truncation(longest)
    labels = {int(number): label for number, label in config["id2label"].items()}
    return Classifier(session, tokenizer, tuple(labels[number] for number in sorted(labels)))


def softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))


def table(texts: list[str], logits: Array, labels: tuple[str, ...]) -> Table:
    """One row per text: the text, its class, and how sure the model is."""
    colours = ("green", "red", "cyan", "yellow", "magenta", "blue")
    drawn = Table("text", "label", "confidence", box=SIMPLE_HEAD)
    for text, chances in zip(texts, softmax(logits), strict=True):
        best = int(chances.argmax())
        colour = colours[best % len(colours)]
        bar = "█" * round(20 * chances[best])
        sure = f"{bar:<20} {chances[best]:4.0%}"
        drawn.add_row(Text(text), Text(labels[best], style=colour), Text(sure, style=colour))
    return drawn


def compare(classifier: Classifier, golden: Path, console: Console) -> bool:
    """Whether the model gives the golden logits; prints how near it comes, and its accuracy."""
    stored = np.load(golden)
    logits = classifier.logits([str(text) for text in stored["texts"]])
    gap = float(np.abs(logits - stored["logits"]).max())
    right, theirs = (int((x.argmax(-1) == stored["labels"]).sum()) for x in (logits, stored["logits"]))
    count = len(logits)
    console.print(
        f"{count} fixed sentences: {right}/{count} right (the golden logits: {theirs}/{count}), "
        f"largest difference from the golden logits {gap:.1e} (allowed: {TOLERANCE:.0e})."
    )
    return gap <= TOLERANCE and right == theirs


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, metavar="ONNX_DIR")
    parser.add_argument("texts", nargs="*", metavar="TEXT")
    parser.add_argument("--file", type=Path, help="one text a line")
    parser.add_argument("--labels", help="names of the classes, in place of those in config.json")
    parser.add_argument("--golden", type=Path, help="an .npz of texts, labels and logits to compare with")
    said = parser.parse_intermixed_args()
    texts = said.texts + (said.file.read_text(encoding="utf-8").splitlines() if said.file else [])
    if not texts and said.golden is None:
        parser.error("nothing to classify: give TEXT, --file or --golden")

    classifier, console = load(said.directory), Console()
    labels = tuple(said.labels.split(",")) if said.labels else classifier.labels
    if len(labels) != len(classifier.labels):
        parser.error(f"the model has {len(classifier.labels)} classes and --labels names {len(labels)}")
    if texts:
        console.print(table(texts, classifier.logits(texts), labels))
    return 0 if said.golden is None or compare(classifier, said.golden, console) else 1


if __name__ == "__main__":
    sys.exit(main())
