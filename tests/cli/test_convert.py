"""`convert`: LoRA and flat prefixes between the two formats, exact in both libraries; and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers as tf
from click.testing import Result

import peftsurgery as ps
from fixtures.adapterhub.ours import CASES
from peftsurgery.errors import AdapterError, PlanError
from tests.reference.test_adapterhub_files import GOLDEN, ROOT, model, output

Run = Callable[..., Result]
LORAS = (
    "bert-lora",
    "bert-lora-everywhere",
    "gpt2-lora",
    "gpt2-lora-everywhere",
    "vit-lora-everywhere",
    "bert-bare-lora",
)
BERT, MINILM = ROOT / "bases" / "bert", Path("fixtures/minilm_lora")


@pytest.mark.parametrize("case", LORAS)
def test_their_lora_in_peft(run: Run, case: str, tmp_path: Path) -> None:
    base = ROOT / "bases" / case.partition("-")[0]
    said = run("convert", ROOT / "theirs" / case, "--to", "peft", "-o", tmp_path / "out", "--base", base)
    assert said.exit_code == 0, said.output
    live = peft.PeftModel.from_pretrained(model(case), tmp_path / "out").eval()
    assert np.abs(output(live, case) - GOLDEN[f"theirs/{case}"]).max() <= 1e-5


def test_a_lora_there_and_back(tmp_path: Path) -> None:
    """What AdapterHub computes with the LoRA that came from PEFT, PEFT computes too."""
    case, name = CASES["bert-lora-from-peft"], "bert-lora-from-peft"
    ps.convert(ROOT / "ours" / name, to="peft", out=tmp_path / "peft")
    live = peft.PeftModel.from_pretrained(case.model(), tmp_path / "peft").eval()
    assert np.abs(output(live, case.base) - GOLDEN[f"ours/{name}"]).max() <= 1e-5
    ps.convert(tmp_path / "peft", to="adapterhub", out=tmp_path / "again", base=BERT)
    first, second = (ps.load_adapter(path, name="x") for path in (ROOT / "ours" / name, tmp_path / "again"))
    assert first == second


def test_a_real_lora(tmp_path: Path) -> None:
    from fixtures.minilm import minilm_path

    ps.convert(MINILM, to="adapterhub", out=tmp_path / "hub", base=minilm_path())
    ps.convert(tmp_path / "hub", to="peft", out=tmp_path / "peft")
    first, second = (
        dict(ps.load_adapter(MINILM).tensors()),
        dict(ps.load_adapter(tmp_path / "peft").tensors()),
    )
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("base", ["bert", "roberta", "electra"])
def test_their_prefix_in_peft(base: str, tmp_path: Path) -> None:
    """The rolled positions make up for PEFT's numbering: the same outputs, from the file alone."""
    case = f"{base}-prefix"
    report = ps.convert(
        ROOT / "theirs" / case,
        to="peft",
        out=tmp_path / "peft",
        base=ROOT / "bases" / base,
        allow_pickle=True,
    )
    assert "3 tokens shorter" in report.hint
    live = peft.PeftModel.from_pretrained(model(case), tmp_path / "peft").eval()
    assert np.abs(output(live, case) - GOLDEN[f"theirs/{case}"]).max() <= 1e-5
    own = ps.inject(model(case), ps.load_adapter(tmp_path / "peft"))
    assert np.abs(output(own, case) - GOLDEN[f"theirs/{case}"]).max() <= 1e-5


def test_a_rolled_prefix_comes_back(tmp_path: Path) -> None:
    ps.convert(ROOT / "ours" / "bert-prefix", to="peft", out=tmp_path / "peft", base=BERT)
    report = ps.convert(tmp_path / "peft", to="adapterhub", out=tmp_path / "hub", base=BERT)
    assert "position_ids" not in report.hint
    before, after = (ps.load_adapter(path) for path in (ROOT / "ours" / "bert-prefix", tmp_path / "hub"))
    assert torch.equal(*(a.shared["prompt_embeddings"] for a in (before, after)))
    assert not after.replaced and not after.reading.position_shift


def test_positions_of_another_base_are_not_dropped(tmp_path: Path) -> None:
    ps.convert(ROOT / "ours" / "bert-prefix", to="peft", out=tmp_path / "peft", base=BERT)
    adapter = ps.load_adapter(tmp_path / "peft")
    next(iter(adapter.replaced.values())).add_(1.0)
    with pytest.raises(AdapterError, match="which is not the base's"):
        ps.convert(adapter, to="adapterhub", out=tmp_path / "hub", base=BERT)


def test_a_prefix_of_peft_says_what_to_do(run: Run, tmp_path: Path) -> None:
    """The library passes over the word that says so; peftsurgery does not."""
    out = tmp_path / "hub"
    said = run(
        "convert", "fixtures/minilm_prefix", "--to", "adapterhub", "-o", out, "--base", _minilm(), "--json"
    )
    assert said.exit_code == 0, said.output
    assert json.loads(said.stdout)["to"] == "adapterhub"
    assert ps.load_adapter(out).reading.position_shift
    report = ps.convert(
        CASES["bert-prefix-from-peft"].adapter, to="adapterhub", out=tmp_path / "b", base=BERT
    )
    assert "`position_ids` that begin at 3" in report.hint


def _minilm() -> str:
    from fixtures.minilm import minilm_path

    return str(minilm_path())


@pytest.mark.parametrize(
    ("path", "to", "message"),
    [
        ("fixtures/minilm_prompt", "adapterhub", "positions and norm"),
        ("fixtures/adapterhub/ours/bert-prefix-projected", "peft", "peftsurgery bake"),
        ("fixtures/adapterhub/ours/bert-prefix", "peft", "--base MODEL"),
        ("fixtures/adapterhub/ours/bert-pfeiffer", "peft", "PEFT has no bottleneck"),
        ("fixtures/adapterhub/ours/bert-fusion", "peft", "PEFT has no fusion"),
        ("fixtures/minilm_lora", "adapterhub", "--base MODEL"),
    ],
)
def test_what_is_not_exact_is_refused(run: Run, path: str, to: str, message: str, tmp_path: Path) -> None:
    said = run("convert", path, "--to", to, "-o", tmp_path / "out")
    assert said.exit_code == 1 and message in said.output
    assert list(tmp_path.iterdir()) == []


def test_a_prefix_of_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    t5 = tf.T5ForConditionalGeneration(tf.T5Config.from_pretrained(ROOT / "bases" / "t5"))
    adapter = ps.remove(ps.inject(t5, ps.PrefixTuning(3)))
    with pytest.raises(AdapterError, match="encoder-decoder"):
        ps.convert(adapter, to="adapterhub", out=tmp_path / "out")


def test_a_prefix_on_computed_positions_is_refused(tmp_path: Path) -> None:
    adapter = ps.load_adapter(ROOT / "ours" / "llama-prefix-from-peft")
    unshifted = replace(adapter, reading=ps.Reading(position_shift=False))
    with pytest.raises(AdapterError, match="computes its positions"):
        ps.convert(unshifted, to="peft", out=tmp_path / "out", base=ROOT / "bases" / "llama")


def test_a_baked_prefix_is_converted(tmp_path: Path) -> None:
    given = ROOT / "ours" / "bert-prefix-projected"
    ps.bake(given, out=tmp_path / "baked")
    ps.convert(tmp_path / "baked", to="peft", out=tmp_path / "peft", base=BERT)
    live = peft.PeftModel.from_pretrained(model("bert"), tmp_path / "peft").eval()
    assert np.abs(output(live, "bert") - GOLDEN["ours/bert-prefix-projected"]).max() <= 1e-5


def test_formats_are_two(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no format"):
        ps.convert(MINILM, to="adapters", out=tmp_path / "out")
