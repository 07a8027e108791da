"""A comparison that can fail: at attended positions, at every shape, for every kind of wrongness."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftsurgery.errors import ParityError
from peftsurgery.graph.inputs import SHAPES, generated
from peftsurgery.graph.parity import Tolerance, check, compare, tolerance, torch_runner
from peftsurgery.graph.signature import BATCH, LENGTH, Port, Signature, signature
from tests.units.graphs import bert

IDS = tuple(
    Port(name, "int64", (BATCH, LENGTH)) for name in ("input_ids", "attention_mask", "token_type_ids")
)
TOKENS = Signature(IDS, (Port("logits", "float32", (BATCH, LENGTH, 3)),), "token-classification", 50, 4, 2)
ROWS = Signature(IDS, (Port("logits", "float32", (BATCH, 3)),), "sequence-classification", 50)
SPANS = Signature(
    IDS,
    tuple(Port(name, "float32", (BATCH, LENGTH)) for name in ("start_logits", "end_logits")),
    "question-answering",
    50,
)
HIDDEN = Signature(IDS, (Port("last_hidden_state", "float32", (BATCH, LENGTH, 3)),), "feature-extraction", 50)
Feeds = Mapping[str, np.ndarray]


def scores(feeds: Feeds) -> np.ndarray:
    return np.stack([np.sin((feeds["input_ids"] + 1) * k) for k in (1.0, 2.0, 3.0)], -1)


def per_token(feeds: Feeds) -> dict[str, np.ndarray]:
    return {"logits": scores(feeds)}


def moved(change: Callable[[np.ndarray, Feeds], np.ndarray]) -> Callable[[Feeds], dict[str, np.ndarray]]:
    return lambda feeds: {"logits": change(scores(feeds), feeds)}


def test_what_agrees() -> None:
    parity = check(compare(per_token, per_token, TOKENS))
    assert (parity.max_abs_diff, parity.mean_abs_diff, parity.top1_agreement) == (0, 0, 1)
    assert [(row.batch, row.length) for row in parity.rows] == list(SHAPES)
    assert json.loads(json.dumps(parity.to_dict()))["rows"][2]["length"] == 64
    assert "tolerance 1e-04" in str(parity)


def test_padding_does_not_count_and_tokens_do() -> None:
    at_padding = moved(lambda s, f: s + 9 * (f["attention_mask"][..., None] == 0))
    assert check(compare(at_padding, per_token, TOKENS)).max_abs_diff == 0
    at_tokens = moved(lambda s, f: s + 2e-4 * f["attention_mask"][..., None])
    with pytest.raises(ParityError, match=r"'logits' differs by 0\.0002") as caught:
        check(compare(at_tokens, per_token, TOKENS))
    assert math.isclose(caught.value.max_abs_diff, 2e-4, rel_tol=1e-6)
    assert (caught.value.tolerance, caught.value.output) == (1e-4, "logits")


def test_one_wrong_element_of_one_shape_is_found() -> None:
    def last(s: np.ndarray, feeds: Feeds) -> np.ndarray:
        s[-1, 0, 0] += 0.5 if s.shape[1] == 64 else 0
        return s

    parity = compare(moved(last), per_token, TOKENS)
    assert (parity.worst.length, round(parity.max_abs_diff, 6)) == (64, 0.5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_infinitely_far(value: float) -> None:
    spoilt = moved(lambda s, f: np.where(np.arange(s.shape[1])[:, None] == 0, value, s))
    for pair in ((spoilt, per_token), (per_token, spoilt)):
        with pytest.raises(ParityError):
            check(compare(*pair, TOKENS, accepted=Tolerance(1e9)))


def test_missing_and_misshapen_outputs() -> None:
    for broken in (lambda feeds: {}, moved(lambda s, f: s[..., :2])):
        assert compare(broken, per_token, TOKENS).max_abs_diff == math.inf


def test_decisions_are_counted_where_there_are_any() -> None:
    flipped = moved(lambda s, f: np.roll(s, 1, axis=-1))
    assert compare(flipped, per_token, TOKENS).top1_agreement == 0
    rows = {"logits": np.array([[1.0, 2, 3]])}
    batch = [{port.name: np.ones((1, 5), np.int64) for port in IDS}]
    other = {"logits": np.array([[3.0, 2, 1]])}
    assert compare(lambda f: rows, lambda f: other, ROWS, batches=batch, shapes=()).top1_agreement == 0
    hidden = compare(
        lambda f: {"last_hidden_state": scores(f)}, lambda f: {"last_hidden_state": scores(f)}, HIDDEN
    )
    assert hidden.top1_agreement is None


def test_spans_are_decided_along_the_attended_tokens() -> None:
    def span(high: float) -> Callable[[Feeds], dict[str, np.ndarray]]:
        def run(feeds: Feeds) -> dict[str, np.ndarray]:
            base = np.where(feeds["attention_mask"], np.arange(feeds["input_ids"].shape[1]), high)
            return {"start_logits": base, "end_logits": base}

        return run

    parity = check(compare(span(1e6), span(-1e6), SPANS))
    assert (len(parity.rows), parity.top1_agreement) == (6, 1)


def test_tolerance_grows_as_the_dtype_shrinks() -> None:
    found = [tolerance(dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    assert [one.of(1.0) for one in found] == sorted(one.of(1.0) for one in found)
    assert [one.of(20.0) / one.of(1.0) for one in found] == [1, 20, 20], (
        "a half rounds by the size of its numbers"
    )
    assert found[0].of(1e3) == 1e-4


@given(
    st.integers(2, 60),
    st.integers(0, 70),
    st.integers(0, 3),
    st.integers(0, 20),
    st.integers(1, 5),
    st.integers(1, 30),
)
def test_generated_inputs_are_fair(
    vocab: int, pad: int, types: int, longest: int, rows: int, columns: int
) -> None:
    said = Signature(IDS, (), "t", vocab, pad, types, longest)
    (feed,) = generated(said, [(rows, columns)])
    ids, mask = feed["input_ids"], feed["attention_mask"]
    assert ids.shape == (rows, min(columns, longest or columns))
    assert set(np.unique(mask)) <= {0, 1} and mask[0].all() and mask.sum(1).min() >= 1
    assert (np.sort(mask, axis=1)[:, ::-1] == mask).all(), "padded on the right"
    attended = ids[mask == 1]
    assert ((attended >= 0) & (attended < vocab)).all() and (attended != pad).all()
    assert (ids[mask == 0] == pad).all()
    assert (feed["token_type_ids"] < max(1, types)).all() and (feed["token_type_ids"][mask == 0] == 0).all()


def test_the_torch_runner_leaves_the_model_in_its_mode() -> None:
    model = bert().train()
    said = signature(model)
    run = torch_runner(model, said)
    (feed,) = generated(said, [(2, 9)])
    first, second = run(feed), run(feed)
    assert np.array_equal(first["logits"], second["logits"]), "no dropout"
    assert model.training and first["logits"].shape == (2, 9, 3)
