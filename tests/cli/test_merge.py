"""`merge MODEL ADAPTER -o OUT`: what transformers loads and PEFT computes, ties, and bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
)

import peftsurgery as ps
from tests.cli.conftest import adapter_for, digest

Run = Callable[..., Result]
IDS = torch.arange(3, 17).reshape(2, 7)


def classifier(bert: Path) -> torch.nn.Module:
    torch.manual_seed(1)
    return AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)


@pytest.fixture
def bert_adapter(bert: Path, tmp_path: Path) -> Path:
    return adapter_for(classifier(bert), "query,value,dense", tmp_path / "adapter")


@pytest.fixture
def llama_adapter(llama: Path, tmp_path: Path) -> Path:
    return adapter_for(AutoModelForCausalLM.from_pretrained(llama), "q_proj,v_proj", tmp_path / "adapter")


def load_checked(path: Path, cls: type) -> torch.nn.Module:
    model, info = cls.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_a_headless_base_becomes_a_classifier(
    run: Run, bert: Path, bert_adapter: Path, tmp_path: Path
) -> None:
    before = digest(bert)
    result = run("merge", bert, bert_adapter, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["added"] == ["classifier.bias", "classifier.weight"]
    merged = load_checked(tmp_path / "out", AutoModelForSequenceClassification)
    oracle = peft.PeftModel.from_pretrained(classifier(bert), bert_adapter)
    assert (logits(merged) - logits(oracle)).abs().max() <= 1e-6
    assert type(merged).__name__ == "BertForSequenceClassification"
    assert merged.config.num_labels == 3
    assert digest(bert) == before


def test_sharded_bf16_is_bit_equal_to_peft(
    run: Run, llama: Path, llama_adapter: Path, tmp_path: Path
) -> None:
    assert run("merge", llama, llama_adapter, "-o", tmp_path / "out").exit_code == 0
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    oracle = peft.PeftModel.from_pretrained(base, llama_adapter).merge_and_unload()
    merged = load_checked(tmp_path / "out", AutoModelForCausalLM)
    expected = oracle.state_dict()
    assert merged.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.state_dict().items())
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(list(llama.glob("*.safetensors")))


def test_files_of_a_size(run: Run, llama: Path, llama_adapter: Path, tmp_path: Path) -> None:
    assert run("merge", llama, llama_adapter, "-o", tmp_path / "same").exit_code == 0
    words = ("merge", llama, llama_adapter, "-o")
    assert run(*words, tmp_path / "out", "--max-shard-size", "10kB").exit_code == 0
    sizes = [file.stat().st_size for file in (tmp_path / "out").glob("model-*.safetensors")]
    assert len(sizes) > 3 and max(sizes) < 15_000
    one, other = (load_checked(tmp_path / name, AutoModelForCausalLM) for name in ("same", "out"))
    assert torch.equal(logits(one), logits(other))
    refused = run(*words, tmp_path / "no", "--max-shard-size", "big")
    assert refused.exit_code == 1 and "'big' is no size" in refused.stderr
    assert not (tmp_path / "no").exists()


def test_several_with_weights(run: Run, llama: Path, llama_adapter: Path, tmp_path: Path) -> None:
    words = ("merge", llama, llama_adapter, llama_adapter, "--dtype", "float32", "-o")
    assert run(*words, tmp_path / "sum", "--weight", 0.75, "--weight", 0.25).exit_code == 0
    assert run("merge", llama, llama_adapter, "--dtype", "float32", "-o", tmp_path / "one").exit_code == 0
    summed, one = (load_checked(tmp_path / name, AutoModelForCausalLM) for name in ("sum", "one"))
    assert summed.dtype == torch.float32
    assert (logits(summed) - logits(one)).abs().max() <= 1e-5


@pytest.mark.parametrize("site", ["embed_tokens", "lm_head"])
def test_a_tied_weight_is_refused_or_untied(run: Run, llama: Path, site: str, tmp_path: Path) -> None:
    adapter = adapter_for(AutoModelForCausalLM.from_pretrained(llama), site, tmp_path / "adapter")
    refused = run("merge", llama, adapter, "-o", tmp_path / "out")
    assert refused.exit_code == 1
    assert "--untie" in refused.stderr
    assert not (tmp_path / "out").exists()
    assert (
        run("merge", llama, adapter, "-o", tmp_path / "out", "--untie", "--dtype", "float32").exit_code == 0
    )
    merged = load_checked(tmp_path / "out", AutoModelForCausalLM)
    assert merged.config.tie_word_embeddings is False
    grafted = ps.inject(
        AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32), ps.load_adapter(adapter)
    )
    assert (logits(merged) - logits(grafted)).abs().max() <= 1e-5
    live = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    with pytest.raises(ps.SurgeryError):
        ps.merge(live, ps.load_adapter(adapter))
    undo = ps.merge(live, ps.load_adapter(adapter), untie=True)
    assert (logits(live) - logits(grafted)).abs().max() <= 1e-5
    undo()
    assert live.config.tie_word_embeddings and live.lm_head.weight is live.model.embed_tokens.weight


def test_twins_that_change_alike_stay_tied(run: Run, llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    config = peft.LoraConfig(
        r=4, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True, task_type="CAUSAL_LM"
    )
    tuned = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    expected = logits(tuned)
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    result = run("merge", llama, tmp_path / "adapter", "-o", tmp_path / "out", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    merged = load_checked(tmp_path / "out", AutoModelForCausalLM)
    assert merged.config.tie_word_embeddings
    assert (logits(merged) - expected).abs().max() <= 1e-4


def broken_nan(base: Path, adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(iter(tensors.values())).view(-1)[3] = float("nan")
    save_file(tensors, adapter / "adapter_model.safetensors")


def broken_missing(base: Path, adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, adapter / "adapter_model.safetensors")


def broken_shape(base: Path, adapter: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "hidden_size": 64, "head_dim": 16}))


def broken_truncated(base: Path, adapter: Path) -> None:
    shard = sorted(base.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])


def broken_header(base: Path, adapter: Path) -> None:
    shard = sorted(base.glob("*.safetensors"))[0]
    shard.write_bytes((2**60).to_bytes(8, "little") + shard.read_bytes()[8:])


def broken_path(base: Path, adapter: Path) -> None:
    file = base / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.norm.weight"] = "../../x"
    file.write_text(json.dumps(index))


def broken_shard(base: Path, adapter: Path) -> None:
    sorted(base.glob("*.safetensors"))[-1].unlink()


def broken_names(base: Path, adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name.replace("self_attn", "attn"): t for name, t in tensors.items()},
        adapter / "adapter_model.safetensors",
    )


def broken_method(base: Path, adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))


@pytest.mark.parametrize(
    ("breaking", "said"),
    [
        (broken_nan, "NaN"),
        (broken_missing, "lora_B"),
        (broken_shape, "another base"),
        (broken_truncated, "bytes long"),
        (broken_header, "announces a header"),
        (broken_path, "outside the model's directory"),
        (broken_shard, "is not in"),
        (broken_names, "are not in the base"),
        (broken_method, "use_dora"),
    ],
)
def test_bad_input(
    run: Run,
    llama: Path,
    llama_adapter: Path,
    tmp_path: Path,
    breaking: Callable[[Path, Path], None],
    said: str,
) -> None:
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    breaking(base, llama_adapter)
    before = digest(tmp_path)
    result = run("merge", base, llama_adapter, "-o", tmp_path / "out")
    assert (result.exit_code, "Traceback" in result.stderr) == (1, False)
    assert said in result.stderr
    assert digest(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_output_not_empty(run: Run, llama: Path, llama_adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep me")
    result = run("merge", llama, llama_adapter, "-o", tmp_path / "out")
    assert result.exit_code == 1 and "not empty" in result.stderr
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep me"
    assert run("merge", llama, llama_adapter, "-o", llama).exit_code == 1


def test_interrupted(
    run: Run, llama: Path, llama_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def interrupt(descriptor: object) -> None:
        calls.append(descriptor)
        if len(calls) == 3:
            raise KeyboardInterrupt

    before = digest(llama)
    monkeypatch.setattr("os.fsync", interrupt)
    result = run("merge", llama, llama_adapter, "-o", tmp_path / "out")
    monkeypatch.undo()
    assert result.exit_code == 1
    assert "Interrupted" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert digest(llama) == before


def test_code_is_never_run_unasked(run: Run, llama: Path, llama_adapter: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    config |= {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"},
    }
    (base / "config.json").write_text(json.dumps(config))
    (base / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    result = run("merge", base, llama_adapter, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "--trust-remote-code" in result.stderr
    assert not (tmp_path / "ran").exists()


def test_old_spellings(run: Run, bert: Path, bert_adapter: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(bert, tmp_path / "base"))
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = load_file(base / "model.safetensors")
    spelled = {
        next((n.replace(k, v) for k, v in old.items() if n.endswith(k)), n): t for n, t in tensors.items()
    }
    assert spelled.keys() != tensors.keys()
    save_file(spelled, base / "model.safetensors", metadata={"format": "pt"})
    assert run("merge", base, bert_adapter, "-o", tmp_path / "old").exit_code == 0
    assert run("merge", bert, bert_adapter, "-o", tmp_path / "new").exit_code == 0
    old_model, new_model = (
        load_checked(tmp_path / n, AutoModelForSequenceClassification) for n in ("old", "new")
    )
    assert torch.equal(logits(old_model), logits(new_model))


def test_experts_that_transformers_stacks_on_loading(run: Run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=99,
        num_local_experts=4,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    assert any("experts.0" in name for name in load_file(tmp_path / "base" / "model.safetensors"))
    adapter = adapter_for(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), "q_proj,o_proj", tmp_path / "adapter"
    )
    result = run("merge", tmp_path / "base", adapter, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    merged = load_checked(tmp_path / "out", AutoModelForCausalLM)
    grafted = ps.inject(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), ps.load_adapter(adapter))
    assert (logits(merged) - logits(grafted)).abs().max() <= 1e-5


def test_a_base_that_lacks_what_the_class_needs(run: Run, bert: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(bert)
    adapter = adapter_for(model, "query", tmp_path / "adapter", task="feature-extraction")
    result = run("merge", bert, adapter, "-o", tmp_path / "out", "--task", "seq-cls")
    assert result.exit_code == 1
    assert "'classifier.weight'" in result.stderr
    assert not (tmp_path / "out").exists()
