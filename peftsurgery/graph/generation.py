"""Text from a decoder's graph: the prompts at once, then a token a step, keys and values kept where they are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from peftsurgery.errors import ExportError
from peftsurgery.graph import cache
from peftsurgery.graph.session import Session

Array = npt.NDArray[Any]
Prefix = Mapping[str, Array]
"""Constant keys and values by name, `prefix.<layer>.key` and `.value`, each (key-value heads, n, head width)."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    Args:
        max_new_tokens: after so many a row ends, if not before.
        temperature: 0 takes the likeliest token; otherwise logits are divided by it and a token is drawn.
        top_k: draw among the so many likeliest; 0 for all.
        top_p: draw among the likeliest that together have this probability (nucleus sampling, Holtzman et al. 2020).
        seed: of the draws.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None


def pick(logits: Array, how: Sampling, random: np.random.Generator) -> Array:
    """The next token of every row, (batch,), of its logits (batch, vocab_size)."""
    if how.temperature <= 0:
        return np.asarray(logits.argmax(-1), dtype=np.int64)
    scores = logits.astype(np.float64) / how.temperature
    if how.top_k:
        least = np.sort(scores, -1)[:, -min(how.top_k, scores.shape[-1]), None]
        scores = np.where(scores < least, -np.inf, scores)
    chances = _softmax(scores)
    if how.top_p < 1:
        chances = _nucleus(chances, how.top_p)
    return np.array([random.choice(len(row), p=row) for row in chances], dtype=np.int64)


def _softmax(scores: Array) -> Array:
    raised: Array = np.exp(scores - scores.max(-1, keepdims=True))
    raised /= raised.sum(-1, keepdims=True)
    return raised


def _nucleus(chances: Array, top_p: float) -> Array:
    order = np.argsort(-chances, -1, kind="stable")
    ranked = np.take_along_axis(chances, order, -1)
    kept = np.where(ranked.cumsum(-1) - ranked < top_p, ranked, 0.0)  # the token that crosses top_p stays
    found: Array = np.zeros_like(chances)
    np.put_along_axis(found, order, kept, -1)
    found /= found.sum(-1, keepdims=True)
    return found


def padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Array, Array]:
    """Token ids and mask, both (batch, longest row), padded on the left."""
    width = max(map(len, rows))
    ids = np.array([[pad_id] * (width - len(row)) + list(row) for row in rows], dtype=np.int64)
    mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows], dtype=np.int64)
    return ids, mask


def steps(
    session: Session,
    ids: Array,
    mask: Array,
    how: Sampling,
    *,
    ends: Sequence[int] = (),
    prefixes: Sequence[Prefix | None] = (),
) -> Iterator[Array]:
    """The next tokens, (batch,), step by step; a row that has ended gives its end token again.

    Args:
        ids, mask: the prompts, (batch, length), padded on the left.
        ends: the tokens that end a row.
        prefixes: for each row what it reads first; rows with different ones, and with none, go together.

    Raises:
        ExportError: the graph has no cache, or a prefix is not one of its model.
    """
    random = np.random.default_rng(how.seed)
    past, seen = _past(session, len(ids), prefixes)
    whole = np.concatenate([seen, mask], 1)
    ended, last = np.zeros(len(ids), bool), ids[:, -1]
    for _ in range(how.max_new_tokens):
        feeds = {
            "input_ids": ids,
            "attention_mask": whole,
            "position_ids": np.maximum(whole.cumsum(1) - 1, 0)[:, -ids.shape[1] :],
        }
        logits, past = session.step(feeds, past)
        last = np.where(ended, last, pick(logits[:, -1], how, random))
        yield last
        ended |= np.isin(last, ends)
        if ended.all():
            return
        ids, whole = last[:, None], np.pad(whole, ((0, 0), (0, 1)), constant_values=1)


def _past(session: Session, rows: int, prefixes: Sequence[Prefix | None]) -> tuple[dict[str, Array], Array]:
    """The past that a text begins with, and its mask, (batch, longest prefix): padded on the left."""
    ports = session.past_ports()
    if not ports:
        raise ExportError(
            "The graph has no past_key_values, so it cannot go on with a text. Export a model for text "
            "generation: `peftsurgery export-onnx MODEL --task text-generation -o OUT`."
        )
    given = [*prefixes] or [None] * rows
    lengths = [0 if prefix is None else _length(prefix, len(ports)) for prefix in given]
    seen = np.arange(max(lengths))[::-1] < np.array(lengths)[:, None]
    past = {}
    for name, (heads, width, dtype) in ports.items():
        past[name] = np.zeros((rows, heads, max(lengths), width), dtype)
        for row, prefix in enumerate(given):
            if prefix is not None:
                past[name][row, :, max(lengths) - lengths[row] :] = _entry(prefix, name, heads, width)
    return past, seen.astype(np.int64)


def _length(prefix: Prefix, entries: int) -> int:
    if len(prefix) != entries:
        raise ExportError(
            f"The prefix has keys and values for {len(prefix) // 2} layers and the model has {entries // 2}. "
            "Take one that was written for this model (`peftsurgery export-onnx MODEL --adapter PROMPT --prefix file`)."
        )
    return int(next(iter(prefix.values())).shape[1])


def _entry(prefix: Prefix, name: str, heads: int, width: int) -> Array:
    key = name.replace(cache.PAST, cache.PREFIX)
    if key not in prefix or prefix[key].shape[::2] != (heads, width):
        found = prefix[key].shape if key in prefix else "missing"
        raise ExportError(
            f"{key!r} is {found} in the prefix and the model takes {heads} heads of width {width}. "
            "Take a prefix that was written for this model."
        )
    return prefix[key]


class Decoder:
    """A decoder's export, ready to write: its graph, its tokenizer, its end tokens.

    Args:
        directory: what `export-onnx` wrote.
        providers, threads: see `Session`.

    Raises:
        ExportError: there is no graph, or ONNX Runtime refuses it.
    """

    def __init__(
        self, directory: str | Path, providers: Sequence[str] | None = None, *, threads: int = 0
    ) -> None:
        self.directory = Path(directory)
        graph = self.directory / "model.onnx"
        if not graph.is_file():
            raise ExportError(f"{directory} holds no model.onnx. Name the directory of an export.")
        self.session = Session(graph, providers, threads=threads)
        self.ends = _ends(self.directory)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer that travels with the export.

        Raises:
            ExportError: there is none.
        """
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.directory)
        except (OSError, ValueError) as error:
            raise ExportError(
                f"{self.directory} holds no tokenizer. Copy the model's tokenizer.json and tokenizer_config.json there."
            ) from error

    def generate(
        self,
        rows: Sequence[Sequence[int]],
        how: Sampling = Sampling(),
        *,
        prefixes: Sequence[Prefix | None] = (),
    ) -> list[list[int]]:
        """The new tokens of every row, to its end token and without it."""
        found = np.stack([*self.steps(rows, how, prefixes=prefixes)], 1).tolist()
        return [self.ended(row) for row in found]

    def ended(self, row: list[int]) -> list[int]:
        """The tokens before the row's end token."""
        stop = next((i for i, token in enumerate(row) if token in self.ends), len(row))
        return row[:stop]

    def steps(
        self, rows: Sequence[Sequence[int]], how: Sampling, *, prefixes: Sequence[Prefix | None] = ()
    ) -> Iterator[Array]:
        """The next token of every row, (batch,), step by step."""
        ids, mask = padded(rows, self.ends[0] if self.ends else 0)
        return steps(self.session, ids, mask, how, ends=self.ends, prefixes=prefixes)


def _ends(directory: Path) -> tuple[int, ...]:
    """The tokens that end a text, as the generation's or the model's configuration says."""
    for name in ("generation_config.json", "config.json"):
        file = directory / name
        said = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        ends = said.get("eos_token_id")
        if ends is not None:
            return (ends,) if isinstance(ends, int) else tuple(ends)
    return ()
