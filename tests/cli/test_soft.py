"""`inject` with the methods of virtual tokens, and `bake` of what it wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result

import peftsurgery as ps
from fixtures.minilm import minilm_path
from peftsurgery.method import TABLE
from tests.cli.conftest import digest

Run = Callable[..., Result]


@pytest.mark.parametrize(
    ("words", "method"),
    [
        (("prompt-tuning", "--num-virtual-tokens", 6), ps.PromptTuning(6)),
        (("p-tuning", "--num-virtual-tokens", 6), ps.PTuning(6)),
        (("p-tuning", "--encoder", "lstm", "--set", "encoder_hidden_size=5"), ps.PTuning(20, "LSTM", 5)),
        (("prefix-tuning", "--num-virtual-tokens", 6), ps.PrefixTuning(6)),
        (("prefix-tuning", "--projection"), ps.PrefixTuning(20, prefix_projection=True)),
    ],
)
def test_a_fresh_soft_prompt_is_written_and_baked(
    run: Run, bert: Path, tmp_path: Path, words: tuple[object, ...], method: object
) -> None:
    done = run("inject", bert, "--method", *words, "--seed", 1, "--task", "seq-cls", "-o", tmp_path / "a")
    assert done.exit_code == 0, done.output
    adapter = ps.load_adapter(tmp_path / "a")
    assert {step.method for step in adapter.plan.steps} == {method}
    assert sorted(adapter.replaced) == ["classifier.bias", "classifier.weight"]
    assert f"bake {tmp_path / 'a'}" in done.stdout
    done = run("bake", tmp_path / "a", "-o", tmp_path / "b", "--base", bert)
    assert done.exit_code == 0, done.output
    baked, expected = ps.load_adapter(tmp_path / "b"), ps.bake(adapter)
    assert isinstance(expected, ps.Adapter)
    assert torch.equal(baked.shared[TABLE], expected.shared[TABLE])


def test_a_prompt_starts_from_a_text(run: Run, tmp_path: Path) -> None:
    words = ("--num-virtual-tokens", 4, "--init-text", "Is it a complaint?")
    done = run("inject", minilm_path(), "--method", "prompt-tuning", *words, "-o", tmp_path / "a")
    assert done.exit_code == 0, done.output
    adapter = ps.load_adapter(tmp_path / "a")
    method = adapter.plan.steps[0].method
    assert isinstance(method, ps.PromptTuning) and method.start_text == "Is it a complaint?"
    from transformers import AutoModel, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(minilm_path())(method.start_text)["input_ids"][:4]
    rows = AutoModel.from_pretrained(minilm_path()).get_input_embeddings().weight[ids]
    assert torch.equal(adapter.shared[TABLE], rows)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("prompt-tuning", "--init-text", "hello"), "no tokenizer"),
        (("prompt-tuning", "--num-virtual-tokens", 600), "leave no room for words"),
        (("prefix-tuning", "--num-virtual-tokens", 600), "leave no room for words"),
        (("prompt-tuning", "--num-virtual-tokens", 0), "num_virtual_tokens is 0"),
        (("prompt-tuning", "--projection"), "prefix_projection"),
        (("prompt-tuning", "--r", 4), "no hyper-parameter 'r'"),
        (("prompt-tuning", "--targets", "query"), "leave out targets"),
        (("lora", "--targets", "query", "--num-virtual-tokens", 4), "num_virtual_tokens"),
    ],
)
def test_words_that_do_not_fit_are_refused(
    run: Run, bert: Path, tmp_path: Path, words: tuple[object, ...], said: str
) -> None:
    done = run("inject", bert, "--method", *words, "-o", tmp_path / "a")
    assert done.exit_code == 1 and said in done.stderr, done.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["bake", "export-onnx"])
def test_another_hidden_size_is_refused(run: Run, bert: Path, tmp_path: Path, verb: str) -> None:
    prompt = Path("fixtures/minilm_prompt")
    asked = ("bake", prompt, "--base", bert) if verb == "bake" else ("export-onnx", bert, "--adapter", prompt)
    before = digest(prompt), digest(bert)
    done = run(*asked, "-o", tmp_path / "out")
    assert done.exit_code == 1 and "(20, 384)" in done.stderr and "another base" in done.stderr, done.output
    assert list(tmp_path.iterdir()) == [] and (digest(prompt), digest(bert)) == before


@pytest.mark.parametrize("verb", ["bake", "export-onnx"])
def test_an_encoder_of_another_adapter_is_refused(run: Run, bert: Path, tmp_path: Path, verb: str) -> None:
    fresh = ("inject", bert, "--method", "p-tuning", "--num-virtual-tokens", 4)
    for seed, name in enumerate(("a", "b")):
        assert run(*fresh, "--seed", seed, "-o", tmp_path / name).exit_code == 0
    (tmp_path / "b" / "encoder.safetensors").replace(tmp_path / "a" / "encoder.safetensors")
    before, left = digest(tmp_path / "a"), {tmp_path / "a", tmp_path / "b"}
    asked = ("bake",) if verb == "bake" else ("export-onnx", bert, "--adapter")
    done = run(*asked, tmp_path / "a", "-o", tmp_path / "out")
    assert done.exit_code == 1 and "does not give its" in done.stderr, done.output
    assert set(tmp_path.iterdir()) == left and digest(tmp_path / "a") == before
