"""The likeliest tokens of any runner, one after another: what two models that agree write alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from peftsurgery.graph import cache
from peftsurgery.graph.generation import Reader, steps
from peftsurgery.graph.inputs import Array, of_tokens
from peftsurgery.graph.parity import Runner
from peftsurgery.graph.sampling import Sampling
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
    """The likeliest next tokens, (texts, tokens): `count`, or as many as the model has positions for, at least one."""
    feed = of_tokens(signature, rows)
    if signature.task == SEQ2SEQ:
        first, read = np.full((len(rows), 1), signature.start_id), _answering(runner, feed)
        room = signature.longest or count
    else:
        first, read = feed["input_ids"], _continuing(runner, feed)
        room = signature.longest - first.shape[1] if signature.longest else count
    return np.stack([*steps(read, first, Sampling(max(1, min(count, room))))], 1)


def _answering(runner: Runner, feed: Mapping[str, Array]) -> Reader:
    """The decoder of a runner that takes all of its tokens at every step."""
    target = np.zeros((len(feed["input_ids"]), 0), np.int64)

    def read(tokens: Array) -> Array:
        nonlocal target
        target = np.concatenate([target, tokens], 1)
        return runner({**feed, TARGET: target})["logits"]

    return read


def _continuing(runner: Runner, feed: Mapping[str, Array]) -> Reader:
    """A decoder whose runner takes keys and values and gives them."""
    following = dict(feed)

    def read(tokens: Array) -> Array:
        nonlocal following
        given = runner({**following, "input_ids": tokens})
        following = _next(following, given)
        return given["logits"]

    return read


def _next(feed: Mapping[str, Array], given: Mapping[str, Array]) -> dict[str, Array]:
    """The feed of one more token in every row, behind what the step before gave."""
    following = dict(feed)
    following["attention_mask"] = np.pad(feed["attention_mask"], ((0, 0), (0, 1)), constant_values=1)
    if "position_ids" in feed:
        following["position_ids"] = feed["position_ids"][:, -1:] + 1
    for name, entry in given.items():
        past = cache.past_of(name)
        if past != name:
            following[past] = entry.astype(feed[past].dtype)
    return following
