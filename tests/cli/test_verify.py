"""`verify` of any two of a model with adapters, a merged checkpoint and a graph, as a person runs it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from transformers import AutoModelForCausalLM

import peftsurgery as ps
from peftsurgery.errors import ParityError
from peftsurgery.graph.greedy import agreement, written
from peftsurgery.graph.inputs import of_tokens, tokens_of
from peftsurgery.graph.parity import compare, torch_runner
from peftsurgery.graph.signature import BATCH, LENGTH, Port, Signature, signature

FIXTURES = Path(__file__).parents[2] / "fixtures"
STORIES, LORA = FIXTURES / "stories260k", FIXTURES / "stories260k_lora"
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, tuple[object, ...]]]:
    """Three forms of one model: each with the words that it takes as `--against`."""
    place = tmp_path_factory.mktemp("forms")
    ps.merge(STORIES, LORA, out=place / "merged")
    ps.export_onnx(STORIES, adapters=LORA, out=place / "onnx", verify=False)
    return {
        "torch": (STORIES, ("--adapter", LORA)),
        "merged": (place / "merged", ()),
        "graph": (place / "onnx", ()),
        "file": (place / "onnx" / "model.onnx", ()),
    }


PAIRS = [
    ("merged", "torch"),
    ("graph", "torch"),
    ("torch", "graph"),
    ("merged", "file"),
    ("graph", "merged"),
    ("file", "graph"),
]


@pytest.mark.parametrize(("model", "against"), PAIRS, ids=" against ".join)
def test_any_two_are_compared(run: Run, models: Any, model: str, against: str, tmp_path: Path) -> None:
    (tmp_path / "texts").write_text("Once upon a time\n\nTom and Lily went to the park. They were glad.\n")
    words = [*models[model][1], *models[against][1]]
    result = run(
        "verify",
        models[model][0],
        "--against",
        models[against][0],
        *words,
        "--texts",
        tmp_path / "texts",
        "--json",
    )
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["texts"] == 2 and said["dtypes"] == ["float32", "float32"] and said["tolerance"] == 1e-4
    assert said["kl"] <= 1e-8 and said["parity"]["top1_agreement"] == 1
    assert said["written"] == {"texts": 2, "new_tokens": 16, "share": 1.0, "parted": None}
    shapes = [(row["batch"], row["length"]) for row in said["parity"]["rows"] if row["output"] == "logits"]
    assert len(shapes) == 11 and shapes[-1][0] == 2, "nine generated, the first text alone, both together"


def test_what_differs_is_reported_before_it_fails(run: Run, models: Any) -> None:
    result = run("verify", STORIES, "--against", models["graph"][0], "--json")
    assert result.exit_code == 1
    said = json.loads(result.stdout)
    assert said["kl"] > 0.1 and said["written"]["share"] < 0.9 and said["written"]["parted"] is not None
    assert "'logits' differs by" in result.stderr
    with pytest.raises(ParityError) as caught:
        ps.verify(STORIES, models["graph"][0], new_tokens=0)
    assert caught.value.report.facts["greedy"] is None


def test_bad_input_has_a_code_of_its_own(run: Run, models: Any, bert: Path, tmp_path: Path) -> None:
    graph = models["graph"][0]
    (tmp_path / "empty").write_text("\n")
    for words, said in (
        ((graph, "--against", graph, "--adapter", LORA), "no adapter goes on"),
        ((graph, "--against", STORIES, "--texts", tmp_path / "lost"), "cannot be read"),
        ((graph, "--against", STORIES, "--texts", tmp_path / "empty"), "holds no text"),
        ((graph, "--against", bert, "--task", "feature-extraction"), "does not"),
        ((bert, "--against", bert, "--texts", LORA / "SOURCE.txt"), "Neither model has a tokenizer"),
        ((graph, "--against", tmp_path / "lost"), "is not a directory"),
    ):
        result = run("verify", *words)
        assert (result.exit_code, said in result.stderr) == (2, True), result.output


def test_another_tokenizer_is_refused(run: Run, bert: Path, tmp_path: Path) -> None:
    shutil.copytree(bert, tmp_path / "bert")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(STORIES / name, tmp_path / "bert")
    result = run("verify", tmp_path / "bert", "--against", tmp_path / "bert")
    assert result.exit_code == 2 and "gives token" in result.stderr


def test_texts_are_padded_where_the_model_reads_them_so() -> None:
    texts = [[5, 6, 7], [8]]
    ids = (Port("input_ids", "int64", (BATCH, LENGTH)), Port("attention_mask", "int64", (BATCH, LENGTH)))
    encoder = of_tokens(Signature(ids, (), "t", 50, 4), texts)
    assert encoder["input_ids"].tolist() == [[5, 6, 7], [8, 4, 4]]
    past = Port("past_key_values.0.key", "float32", (BATCH, 2, "past_sequence_length", 8))
    positions = Port("position_ids", "int64", (BATCH, LENGTH))
    decoder = of_tokens(Signature((*ids, positions, past), (), "t", 50, 4), texts)
    assert decoder["input_ids"].tolist() == [[5, 6, 7], [4, 4, 8]]
    assert decoder["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]
    assert decoder["past_key_values.0.key"].shape == (2, 2, 0, 8)
    assert tokens_of(encoder) == tokens_of(decoder) == texts
    assert of_tokens(Signature(ids, (), "t", 50, 4, longest=2), texts)["input_ids"].shape == (2, 2)


def test_the_likeliest_tokens_are_those_of_generate() -> None:
    model = AutoModelForCausalLM.from_pretrained(STORIES).eval()
    said, rows = signature(model), [[1, 403, 407, 261, 378], [1, 291, 280]]
    run = torch_runner(model, said)
    found = written(run, said, rows, 12)
    for row, tokens in zip(rows, found, strict=True):
        ids = torch.tensor([row])
        expected = model.generate(
            ids, attention_mask=ids > 0, max_new_tokens=12, do_sample=False, eos_token_id=None
        )
        assert tokens.tolist() == expected[0, len(row) :].tolist()

    def late(feeds: Any) -> Any:
        """Wrong from the third token on: the one that the prompt and two more are behind."""
        given = run(feeds)
        shift = 3 if feeds["past_key_values.0.key"].shape[2] > 5 else 0
        return {**given, "logits": np.roll(given["logits"], shift, -1)}

    parted = agreement(late, run, said, rows, 12)
    assert (parted.texts, parted.new_tokens, parted.parted) == (2, 12, 2) and parted.share < 1


def test_divergence_is_kullbacks() -> None:
    ids = (Port("input_ids", "int64", (BATCH, LENGTH)), Port("attention_mask", "int64", (BATCH, LENGTH)))
    said = Signature(ids, (Port("logits", "float32", (BATCH, 2)),), "sequence-classification", 50)
    feed = {"input_ids": np.ones((1, 3), int), "attention_mask": np.ones((1, 3), int)}
    p, q = np.array([[0.25, 0.75]]), np.array([[0.5, 0.5]])

    def says(chances: np.ndarray) -> Any:
        return lambda feeds: {"logits": np.log(chances)}

    found = compare(says(q), says(p), said, batches=[feed], shapes=())
    assert math.isclose(found.kl, 0.25 * math.log(0.5) + 0.75 * math.log(1.5), rel_tol=1e-12)
    assert compare(says(p), says(p), said, batches=[feed], shapes=()).kl == 0
    assert compare(says(p * np.nan), says(p), said, batches=[feed], shapes=()).kl == math.inf
