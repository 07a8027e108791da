"""`remove CHECKPOINT`: a checkpoint that was saved with tuner modules in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import peftsurgery as ps
from tests.cli.conftest import digest

Run = Callable[..., Result]


def entangled(llama: Path, out: Path) -> peft.PeftModel:
    """What `save_pretrained` of the model inside a PeftModel leaves behind."""
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 2},
        task_type="CAUSAL_LM",
    )
    tuned = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    out.mkdir()
    kept = {name: p.detach() for name, p in tuned.base_model.model.named_parameters()}
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_bytes((llama / "config.json").read_bytes())
    return tuned


def test_a_clean_base_and_the_adapter(run: Run, llama: Path, tmp_path: Path) -> None:
    tuned = entangled(llama, tmp_path / "tangle")
    before = digest(tmp_path / "tangle")
    words = ("remove", tmp_path / "tangle", "-o", tmp_path / "clean", "--adapter-out", tmp_path / "adapter")
    result = run(*words, "--alpha", 12)
    assert result.exit_code == 0, result.output
    plain = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    clean = load_file(tmp_path / "clean" / "model.safetensors")
    assert clean.keys() == dict(plain.named_parameters()).keys()
    assert all(torch.equal(clean[name], p) for name, p in plain.named_parameters())
    ids = torch.arange(3, 13).reshape(2, 5)
    grafted = AutoModelForCausalLM.from_pretrained(tmp_path / "clean", dtype=torch.float32)
    grafted = ps.inject(grafted, ps.load_adapter(tmp_path / "adapter"))
    with torch.no_grad():
        assert (grafted.eval()(ids).logits - tuned.eval()(ids).logits).abs().max() <= 1e-5
    assert digest(tmp_path / "tangle") == before


def test_what_the_checkpoint_does_not_say_is_asked(run: Run, llama: Path, tmp_path: Path) -> None:
    entangled(llama, tmp_path / "tangle")
    words = ("remove", tmp_path / "tangle", "-o", tmp_path / "clean", "--adapter-out", tmp_path / "adapter")
    result = run(*words)
    assert result.exit_code == 1 and "--alpha" in result.stderr
    assert not (tmp_path / "clean").exists()
    assert run(*words, "--alpha", 12, "--name", "other").exit_code == 1
    assert run("remove", tmp_path / "tangle", "-o", tmp_path / "clean").exit_code == 0


def test_a_clean_checkpoint_is_said_to_be_clean(run: Run, llama: Path, tmp_path: Path) -> None:
    result = run("remove", llama, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "clean already" in result.stderr
    assert not list(tmp_path.iterdir())
