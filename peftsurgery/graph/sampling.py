"""How the next token of a text is chosen of its logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


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


GREEDY = Sampling()


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
