"""Text from an export: what is read first at once, then a token a step, keys and values kept where they are.

A decoder goes on with its prompt. An encoder-decoder reads the prompt in its encoder, and its decoder begins with
the token that its configuration names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from peftsurgery.errors import ExportError
from peftsurgery.graph.pair import Pair, graphs, opened
from peftsurgery.graph.prefixes import Prefix, first_past
from peftsurgery.graph.rules import FREE, Rules, rules_of
from peftsurgery.graph.sampling import GREEDY, Array, Sampling, pick
from peftsurgery.graph.session import Session

Reader = Callable[[Array], Array]
"""What reads the next tokens, (batch, n), behind all that it has read, and gives the logits of what follows each."""


def steps(read: Reader, first: Array, how: Sampling, rules: Rules = FREE) -> Iterator[Array]:
    """The next tokens, (batch,), step by step; a row that has ended gives its end token again.

    Args:
        read: what remembers the texts.
        first: the tokens that it reads at once, (batch, n).
    """
    random = np.random.default_rng(how.seed)
    ids, last, ended = first, first[:, -1], np.zeros(len(first), bool)
    for step in range(how.max_new_tokens):
        chosen = pick(rules.allowed(read(ids)[:, -1]), how, random)
        last = np.where(ended, last, rules.forced(chosen, step, how.max_new_tokens))
        yield last
        ended |= np.isin(last, rules.ends)
        if ended.all():
            return
        ids = last[:, None]


def padded(rows: Sequence[Sequence[int]], pad_id: int, *, left: bool = True) -> tuple[Array, Array]:
    """Token ids and mask, both (batch, longest row), padded on the left, or else on the right."""
    width = max(map(len, rows))
    columns = np.arange(width)
    mask = (columns[::-1] if left else columns) < np.array([len(row) for row in rows])[:, None]
    ids = np.full(mask.shape, pad_id, np.int64)
    ids[mask] = np.concatenate([np.asarray(row, np.int64) for row in rows])
    return ids, mask.astype(np.int64)


def continuing(session: Session, mask: Array, prefixes: Sequence[Prefix | None] = ()) -> Reader:
    """A decoder in front of fresh texts.

    Args:
        mask: of the tokens that it reads first, (batch, length), padded on the left.
        prefixes: for each row what it reads before them; rows with different ones, and with none, go together.

    Raises:
        ExportError: the graph has no cache, or a prefix is not one of its model.
    """
    past, seen = first_past(session.past_ports(), len(mask), prefixes)
    whole = np.concatenate([seen, mask], 1)

    def read(ids: Array) -> Array:
        nonlocal past, whole
        positions = np.maximum(whole.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        feeds = {"input_ids": ids, "attention_mask": whole, "position_ids": positions}
        logits, past = session.step(feeds, past)
        whole = np.pad(whole, ((0, 0), (0, 1)), constant_values=1)
        return logits

    return read


def answering(pair: Pair, ids: Array, mask: Array) -> Reader:
    """A decoder that has written nothing yet, behind an encoder that has read texts, (batch, length)."""
    state = pair.read({"input_ids": ids, "attention_mask": mask})

    def read(tokens: Array) -> Array:
        nonlocal state
        logits, state = pair.write(state, tokens)
        return logits

    return read


class Decoder:
    """An export that writes, ready: its graph or its two, its tokenizer, and what its configuration says of writing.

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
        files = graphs(self.directory)
        if not files:
            raise ExportError(f"{directory} holds no model.onnx. Name the directory of an export.")
        self.session = opened(files, providers, threads=threads)
        self.rules = rules_of(self.directory)

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
        how: Sampling = GREEDY,
        *,
        prefixes: Sequence[Prefix | None] = (),
    ) -> list[list[int]]:
        """The new tokens of every row, to its end token and without it."""
        found = np.stack([*self.steps(rows, how, prefixes=prefixes)], 1).tolist()
        return [self.ended(row) for row in found]

    def ended(self, row: list[int]) -> list[int]:
        """The tokens before the row's end token."""
        stop = next((i for i, token in enumerate(row) if token in self.rules.ends), len(row))
        return row[:stop]

    def steps(
        self, rows: Sequence[Sequence[int]], how: Sampling, *, prefixes: Sequence[Prefix | None] = ()
    ) -> Iterator[Array]:
        """The next token of every row, (batch,), step by step.

        Raises:
            ExportError: a prefix is not one of the model, or is fed to an encoder-decoder.
        """
        if isinstance(self.session, Session):
            ids, mask = padded(rows, self.rules.pad)
            return steps(continuing(self.session, mask, prefixes), ids, how, self.rules.without_first())
        if prefixes:
            raise ExportError(
                "A prefix is fed to a decoder's graph, and this is an encoder-decoder's, which has its own baked in. "
                "Leave out `--prefix`, or export with the adapter."
            )
        ids, mask = padded(rows, self.rules.pad, left=False)
        begin = np.full((len(rows), 1), self.rules.start, np.int64)
        return steps(answering(self.session, ids, mask), begin, how, self.rules)
