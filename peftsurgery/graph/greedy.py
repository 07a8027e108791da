"""The likeliest tokens of any runner, one after another: what two models that agree write alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from peftsurgery.graph import cache
from peftsurgery.graph.inputs import Array, of_tokens
from peftsurgery.graph.parity import Runner
from peftsurgery.graph.signature import GENERATION, SEQ2SEQ, TARGET, Signature

WRITES = frozenset({GENERATION, SEQ2SEQ})
"""The tasks whose models write."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two models write the same.

    Args:
        texts: how many.
        new_tokens: of each text; ends of texts are not heeded.
        share: of equal tokens.
        parted: the step at which the first text parts, from 0; None where none does.
    """

    texts: int
    new_tokens: int
    share: float
    parted: int | None

    def __str__(self) -> str:
        many = f"{self.texts} texts × {self.new_tokens} new tokens"
        return f"{self.share:.1%} of {many}" + ("" if self.parted is None else f", parting at {self.parted}")


def agreement(
    runner: Runner, reference: Runner, signature: Signature, rows: Sequence[Sequence[int]], count: int
) -> Agreement:
    """Let both go on with the same texts, padded in one batch, by up to `count` tokens each."""
    found, expected = (written(side, signature, rows, count) for side in (runner, reference))
    same = found == expected
    apart = np.flatnonzero(~same.all(0))
    texts, steps = same.shape
    return Agreement(texts, steps, float(same.mean()), int(apart[0]) if len(apart) else None)


def written(runner: Runner, signature: Signature, rows: Sequence[Sequence[int]], count: int) -> Array:
    """The likeliest next tokens, (texts, tokens), at least one and as many of `count` as the model has positions for.

    An encoder-decoder begins with the token of padding.
    """
    feed = of_tokens(signature, rows)
    if signature.task == SEQ2SEQ:
        return _decoded(runner, feed, signature.pad_id, count)
    room = signature.longest - feed["input_ids"].shape[1] if signature.longest else count
    return _continued(runner, feed, max(1, min(count, room)))


def _decoded(runner: Runner, feed: Mapping[str, Array], start: int, count: int) -> Array:
    target = np.full((len(feed["input_ids"]), 1), start)
    for _ in range(count):
        logits = runner({**feed, TARGET: target})["logits"]
        target = np.concatenate([target, logits[:, -1:].argmax(-1)], 1)
    return target[:, 1:]


def _continued(runner: Runner, feed: Mapping[str, Array], count: int) -> Array:
    tokens = []
    for _ in range(count):
        given = runner(feed)
        tokens.append(given["logits"][:, -1].argmax(-1))
        feed = _next(feed, tokens[-1], given)
    return np.stack(tokens, 1)


def _next(feed: Mapping[str, Array], tokens: Array, given: Mapping[str, Array]) -> dict[str, Array]:
    """The feed of one more token in every row, behind what the step before gave."""
    following = dict(feed)
    following["input_ids"] = tokens[:, None]
    following["attention_mask"] = np.pad(feed["attention_mask"], ((0, 0), (0, 1)), constant_values=1)
    if "position_ids" in feed:
        following["position_ids"] = feed["position_ids"][:, -1:] + 1
    for name, entry in given.items():
        if name.startswith(f"{cache.PRESENT}."):
            past = name.replace(cache.PRESENT, cache.PAST, 1)
            following[past] = entry.astype(feed[past].dtype)
    return following
