"""Writing with an exported encoder-decoder: where texts begin and end, and as a person runs it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import peftsurgery as ps
from peftsurgery.cli import main
from peftsurgery.errors import ExportError, PlanError
from peftsurgery.graph.generation import Decoder
from peftsurgery.graph.rules import Rules, rules_of
from peftsurgery.graph.sampling import Sampling
from tests.reference.test_export_seq2seq import ROWS, SMALL_MBART, T5, transformers_writes, we_write
from tests.subjects import transformer

STORIES = Path(__file__).parents[2] / "fixtures" / "stories260k"


def test_a_row_that_ends_waits_for_the_others(tmp_path: Path) -> None:
    model = SMALL_MBART.model()
    free = transformers_writes(model)
    end = next(token for token in free[0][1:] if token not in free[1])
    model.generation_config.eos_token_id = model.config.eos_token_id = end
    ps.export_onnx(model, out=tmp_path / "onnx", verify=False)
    decoder = Decoder(tmp_path / "onnx")
    assert we_write(tmp_path / "onnx") == transformers_writes(model)
    found = decoder.generate(ROWS, Sampling(10))
    assert found[0] == free[0][: free[0].index(end)] and found[1] == free[1]


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 with a tokenizer, exported from its directory."""
    place = tmp_path_factory.mktemp("speaking")
    words = {**T5, "vocab_size": 512, "decoder_start_token_id": 2, "pad_token_id": 0, "eos_token_id": 1}
    model = transformer("T5ForConditionalGeneration", words)
    model.generation_config.num_beams = 4
    model.save_pretrained(place / "t5")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(STORIES / file, place / "t5")
    ps.export_onnx(place / "t5", out=place / "onnx", verify=False)
    return place


@pytest.fixture
def run() -> Callable[..., Result]:
    def call(*words: object) -> Result:
        return CliRunner().invoke(main, [str(word) for word in words])

    return call


def test_on_the_command_line(speaking: Path, run: Callable[..., Result]) -> None:
    words = ("--prompt", "One day", "--max-new-tokens", 9)
    shown = run("generate", speaking / "onnx", *words)
    assert shown.exit_code == 0, shown.output
    said = json.loads(run("generate", speaking / "onnx", *words, "--json").stdout)
    assert shown.stdout.startswith(said["texts"][0]["text"]) and said["tokens"] == 9
    assert said["unheeded"] == ["num_beams=4"]
    both = ("--prompt", "The cat sat on the mat", *words, "--json")
    texts = json.loads(run("generate", speaking / "onnx", *both).stdout)["texts"]
    assert texts[1]["tokens"] == said["texts"][0]["tokens"], "a row beside a longer one"
    compared = run("verify", speaking / "onnx", "--against", speaking / "t5", "--json")
    assert compared.exit_code == 0, compared.output
    assert json.loads(compared.stdout)["written"] == {
        "texts": 7,
        "new_tokens": 16,
        "share": 1.0,
        "parted": None,
    }


def test_what_does_not_fit_is_an_error(speaking: Path) -> None:
    with pytest.raises(ExportError, match="has its own baked in"):
        ps.generate(speaking / "onnx", "a", prefixes=["none"])
    with pytest.raises(PlanError, match="is no decoder"):
        ps.export_onnx(speaking / "t5", out=speaking / "apart", prefix="file")
    assert not (speaking / "apart").exists()
    (speaking / "bare").mkdir()
    shutil.copytree(speaking / "onnx", speaking / "bare", dirs_exist_ok=True)
    text = (speaking / "bare" / "tokenizer.json").read_text()
    settings = json.loads(text)
    settings["post_processor"] = None
    (speaking / "bare" / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(PlanError, match="has no tokens"):
        ps.generate(speaking / "bare", "")
    (speaking / "bare" / "decoder_model.onnx").unlink()
    with pytest.raises(ExportError, match=r"no model\.onnx"):
        ps.generate(speaking / "bare", "a")


def test_rules_are_read_of_both_files(tmp_path: Path) -> None:
    assert rules_of(tmp_path) == Rules()
    (tmp_path / "config.json").write_text('{"eos_token_id": [2, 5], "pad_token_id": null, "bos_token_id": 7}')
    assert rules_of(tmp_path) == Rules(ends=(2, 5), pad=2, start=7)
    generation = {
        "eos_token_id": 3,
        "pad_token_id": 1,
        "decoder_start_token_id": 9,
        "forced_bos_token_id": 11,
        "forced_eos_token_id": [3, 4],
        "bad_words_ids": [[6], [8, 9], [3]],
        "suppress_tokens": [2],
        "num_beams": 1,
        "no_repeat_ngram_size": 3,
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert rules_of(tmp_path) == Rules((3,), 1, 9, 11, 3, (2, 6), ("no_repeat_ngram_size=3",))
