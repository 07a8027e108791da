"""The layers of two models side by side: where do they part?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from peftsurgery.errors import ExportError, PlanError
from peftsurgery.graph import layers
from peftsurgery.graph.inputs import Array
from peftsurgery.graph.pair import Pair
from peftsurgery.graph.parity import Runner, Tolerance, apart, fitted
from peftsurgery.graph.session import Session
from peftsurgery.graph.signature import TARGET
from peftsurgery.graph.values import array


@dataclass(frozen=True, slots=True)
class Layer:
    """What two models make of the same inputs in one layer.

    Args:
        max_abs_diff, mean_abs_diff: of its hidden states at attended tokens, over all batches; infinite where one
            side is not finite or they have not one shape.
        parts: whether a value differs by more than is accepted; of one above 1 that is accepted as a part of it.
    """

    name: str
    max_abs_diff: float
    mean_abs_diff: float
    parts: bool


def compare(
    runner: Runner, reference: Runner, feeds: Iterable[Mapping[str, Array]], accepted: Tolerance
) -> tuple[Layer, ...]:
    """Run both on the same inputs and compare the layers that both have, in the reference's order.

    Args:
        runner, reference: from inputs by name to hidden states by the names of layers.
        accepted: what they may differ by.

    Raises:
        PlanError: they have none in common.
    """
    found: dict[str, list[Layer]] = {}
    for feed in feeds:
        left, right = runner(feed), reference(feed)
        for name in (name for name in right if name in left):
            found.setdefault(name, []).append(_compared(name, left[name], right[name], feed, accepted))
    if not found:
        raise PlanError(
            "The two have no layer of one name, so there is none to compare. Compare models of one class, or leave "
            "out `--layers`."
        )
    return tuple(_together(batches) for batches in found.values())


def _together(batches: Sequence[Layer]) -> Layer:
    """One layer on several batches."""
    means = [one.mean_abs_diff for one in batches]
    worst = max(one.max_abs_diff for one in batches)
    return Layer(batches[0].name, worst, float(np.mean(means)), any(one.parts for one in batches))


def _compared(
    name: str, found: Array, expected: Array, feed: Mapping[str, Array], accepted: Tolerance
) -> Layer:
    """One layer on one batch."""
    if found.shape != expected.shape:
        return Layer(name, np.inf, np.inf, True)
    kept = _attended(feed, expected)
    a, b = (side[kept].astype(np.float64) for side in (found, expected))
    gap, sizes = apart(a, b), np.abs(b[np.isfinite(b)])
    with np.errstate(invalid="ignore"):
        beyond = ~(gap / np.maximum(1.0, np.abs(b)) <= accepted.absolute)  # what is not finite is beyond
    parts = bool(beyond.any()) and float(gap.max()) > accepted.of(float(sizes.max(initial=0.0)))
    return Layer(name, float(gap.max()), float(gap.mean()), parts)


def _attended(feed: Mapping[str, Array], hidden: Array) -> Array:
    """Which of its tokens count, (batch, tokens): all of an image's and of what an encoder-decoder's decoder reads."""
    target = feed.get(TARGET)
    is_target = target is not None and target.shape[1] == hidden.shape[1]
    if is_target or "attention_mask" not in feed:
        return np.ones(hidden.shape[:2], bool)
    return fitted(feed["attention_mask"].astype(bool), hidden)


def told_by(model: nn.Module, run: Runner) -> Runner:
    """A live model's `run`, giving what its layers give, by their names."""
    named = layers.of(model)

    def told(feeds: Mapping[str, Array]) -> dict[str, Array]:
        with layers.watched(named) as seen:
            run(feeds)
        return {name: hidden.double().cpu().numpy() for name, hidden in seen.items()}

    return told


def told_in(files: Sequence[Path]) -> Runner:
    """What runs the graphs of one model and gives what their layers give, by their names.

    Raises:
        ExportError: they do not say which of their values those are; as `Session` does.
    """
    held = [layers.remembered(file) for file in files]
    if not any(held):
        raise ExportError(
            f"{files[0]} does not say which of its values are its layers' outputs. Export it again with `peftsurgery "
            "export-onnx`, or leave out `--layers`."
        )
    values = {name: value for some in held for name, value in some.items()}
    give = _giving(files, [[*some.values()] for some in held])

    def told(feeds: Mapping[str, Array]) -> dict[str, Array]:
        given = give(feeds)
        return {name: given[value] for name, value in values.items()}

    return told


def _giving(files: Sequence[Path], reveal: Sequence[Sequence[str]]) -> Runner:
    """The graphs of one model, giving some values inside of them too; a decoder reads its tokens at once."""
    if len(files) == 1:
        return Session(files[0], reveal=reveal[0])
    pair = Pair(files[0], files[1], reveal=(reveal[0], reveal[1]))

    def give(feeds: Mapping[str, Array]) -> dict[str, Array]:
        _, given = pair.write(pair.read(feeds), feeds[TARGET])
        return {
            name: value if isinstance(value, np.ndarray) else array(value) for name, value in given.items()
        }

    return give
