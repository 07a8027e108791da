"""What a model's configuration says of writing: its tokens of beginning, end and padding, and what it forces."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from peftsurgery.graph.sampling import Array

FILES = ("config.json", "generation_config.json")
"""Where it is said; the later one has the last word."""
UNHEEDED: Mapping[str, Any] = {
    "num_beams": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "repetition_penalty": 1.0,
    "min_length": 0,
    "min_new_tokens": 0,
}
"""The words for ways of searching that are not taken here, and their values where they ask for nothing."""


@dataclass(frozen=True, slots=True)
class Rules:
    """How a model's texts begin and end.

    Args:
        ends: the tokens that end a row.
        pad: that of padding.
        start: what the decoder of an encoder-decoder begins with.
        first: the token that is written first, whatever the logits say (mBART's language).
        last: the token that is written last where a row reaches its longest.
        never: tokens that are not written.
        unheeded: what else the configuration asks for, such as beams.
    """

    ends: tuple[int, ...] = ()
    pad: int = 0
    start: int = 0
    first: int | None = None
    last: int | None = None
    never: tuple[int, ...] = ()
    unheeded: tuple[str, ...] = ()

    def allowed(self, logits: Array) -> Array:
        """Logits, (batch, vocab_size), with no chance for what is never written."""
        if not self.never:
            return logits
        scores = logits.copy()
        scores[:, self.never] = -np.inf
        return scores

    def forced(self, chosen: Array, step: int, count: int) -> Array:
        """The tokens of a step of `count`, (batch,): the chosen ones where none is forced."""
        token = self.first if step == 0 else None
        if step == count - 1 and token is None:
            token = self.last
        return chosen if token is None else np.full_like(chosen, token)

    def without_first(self) -> Rules:
        """Those of a text that has begun already."""
        return replace(self, first=None)


FREE = Rules()
"""Nothing ends a text but its length."""


def rules_of(directory: Path) -> Rules:
    """What the configuration files in a directory say."""
    said: dict[str, Any] = {}
    for name in FILES:
        file = directory / name
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        said.update({word: value for word, value in found.items() if value is not None})
    ends = _tokens(said.get("eos_token_id"))
    pad = said.get("pad_token_id", next(iter(ends), 0))
    words = said.get("bad_words_ids") or ()
    barred = {*_tokens(said.get("suppress_tokens")), *(word[0] for word in words if len(word) == 1)}
    return Rules(
        ends=ends,
        pad=int(pad),
        start=int(said.get("decoder_start_token_id", said.get("bos_token_id", pad))),
        first=said.get("forced_bos_token_id"),
        last=next(iter(_tokens(said.get("forced_eos_token_id"))), None),
        never=tuple(sorted(barred - {*ends})),
        unheeded=tuple(
            f"{word}={said[word]}" for word, nothing in UNHEEDED.items() if said.get(word, nothing) != nothing
        ),
    )


def _tokens(said: Any) -> tuple[int, ...]:
    """One token, several or none."""
    return () if said is None else (said,) if isinstance(said, int) else tuple(said)
