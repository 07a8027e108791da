"""What PEFT can put in an adapter: the merged checkpoint computes the same, or the merge is refused.

And what has gone wrong in mergers of other projects, each once.
"""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import peftsurgery as ps
from peftsurgery.errors import PlanError
from tests.cli.conftest import digest

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

IDS = torch.arange(3, 17).reshape(2, 7)
TENSORS = "adapter_model.safetensors"
LINEAR = ["q_proj", "v_proj"]
BATTERY: Mapping[str, Mapping[str, Any]] = {
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "output embedding": {"target_modules": ["lm_head", "q_proj"]},
    "head": {"target_modules": LINEAR, "modules_to_save": ["lm_head"]},
    "embedding as a head": {"target_modules": LINEAR, "modules_to_save": ["embed_tokens"]},
    "bias of the targets": {"target_modules": LINEAR, "bias": "lora_only"},
    "every bias": {"target_modules": LINEAR, "bias": "all"},
    "bias of the update": {"target_modules": LINEAR, "lora_bias": True},
    "rank pattern": {"target_modules": LINEAR, "rank_pattern": {"layers.1.self_attn.q_proj": 2, "v_proj": 7}},
    "alpha pattern": {"target_modules": LINEAR, "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 31}},
    "rslora": {"target_modules": LINEAR, "use_rslora": True},
    "rslora with patterns": {
        "target_modules": LINEAR,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 9},
        "alpha_pattern": {"q_proj": 3},
    },
    "all-linear": {"target_modules": "all-linear"},
}
REFUSED: Mapping[str, Mapping[str, Any]] = {
    "layer_replication": {"target_modules": LINEAR, "layer_replication": [(0, 2), (0, 2)]},
    "use_dora": {"target_modules": LINEAR, "use_dora": True},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("base"), tied=False)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("tied"), tied=True)


def llama(path: Path, *, tied: bool) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=99,
        attention_bias=True,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path, max_shard_size="20KB")
    return path


def tuned(base: Path, out: Path, **options: Any) -> Tensor:
    """What PEFT computes with an adapter away from its start, which it saves."""
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=12, **options)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(out, save_embedding_layers=False)
    return logits(model)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def loaded(path: Path) -> nn.Module:
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    return model


def grafted(base: Path, adapter: Path) -> nn.Module:
    return ps.inject(AutoModelForCausalLM.from_pretrained(base), ps.load_adapter(adapter))


def close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-5 * other.abs().max())


@pytest.mark.parametrize("case", BATTERY)
def test_the_merged_checkpoint_computes_what_the_adapter_does(case: str, base: Path, tmp_path: Path) -> None:
    expected = tuned(base, tmp_path / "adapter", **BATTERY[case])
    ps.merge(base, tmp_path / "adapter", out=tmp_path / "out")
    merged = logits(loaded(tmp_path / "out"))
    assert close(merged, expected)
    assert close(merged, logits(grafted(base, tmp_path / "adapter")))
    assert not close(merged, logits(loaded(base)))


@pytest.mark.parametrize("case", ["embedding", "output embedding", "head", "embedding as a head"])
def test_a_tied_weight_is_refused_or_untied(case: str, tied: Path, tmp_path: Path) -> None:
    """PEFT trains one name of a tied weight alone, which the merged model can only say untied."""
    expected = tuned(tied, tmp_path / "adapter", **BATTERY[case])
    with pytest.raises(ps.SurgeryError, match="untie"):
        ps.merge(tied, tmp_path / "adapter", out=tmp_path / "out")
    ps.merge(tied, tmp_path / "adapter", out=tmp_path / "out", untie=True)
    merged = loaded(tmp_path / "out")
    assert close(logits(merged), expected)
    assert close(logits(merged), logits(grafted(tied, tmp_path / "adapter")))


@pytest.mark.parametrize("option", REFUSED)
def test_what_is_not_implemented_is_refused(option: str, base: Path, tmp_path: Path) -> None:
    tuned(base, tmp_path / "adapter", **REFUSED[option])
    with pytest.raises(ps.SurgeryError, match=option):
        ps.merge(base, tmp_path / "adapter", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def half_matching(base: Path, adapter: Path) -> None:
    tensors = load_file(adapter / TENSORS)
    save_file({k.replace("layers.1.", "layers.7."): v for k, v in tensors.items()}, adapter / TENSORS)


def half_written(base: Path, adapter: Path) -> None:
    whole = (adapter / TENSORS).read_bytes()
    (adapter / TENSORS).write_bytes(whole[: len(whole) // 2])


def lacking(base: Path, adapter: Path) -> None:
    """A tensor that the adapter does not touch is gone, from its shard and from the index."""
    index = json.loads((base / "model.safetensors.index.json").read_text())
    file = base / index["weight_map"].pop("model.norm.weight")
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({k: v for k, v in load_file(file).items() if k != "model.norm.weight"}, file)


def smaller(base: Path, adapter: Path) -> None:
    """The layers have other shapes."""
    tensors = load_file(adapter / TENSORS)
    turned = {k: v[:, :16].contiguous() if "lora_A" in k else v for k, v in tensors.items()}
    save_file(turned, adapter / TENSORS)


def replicating(base: Path, adapter: Path) -> None:
    """The word is in the configuration and its copies are not in the tensors."""
    said = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**said, "layer_replication": [[0, 2], [1, 2]]}))


@pytest.mark.parametrize(
    ("breaking", "said"),
    [
        (half_matching, "layers.7"),
        (half_written, "bytes long"),
        (lacking, r"model\.norm\.weight"),
        (smaller, "another base|expects"),
        (replicating, "layer_replication"),
    ],
)
def test_what_others_merge_without_a_word_is_refused(
    breaking: Callable[[Path, Path], None], said: str, base: Path, tmp_path: Path
) -> None:
    """The rest of them (NaN, no lora_B, no shard, no key) is among the bad input of the command line."""
    mine = Path(shutil.copytree(base, tmp_path / "base"))
    tuned(base, tmp_path / "adapter", target_modules=LINEAR)
    breaking(mine, tmp_path / "adapter")
    before = digest(tmp_path)
    with pytest.raises(ps.SurgeryError, match=said):
        ps.merge(mine, tmp_path / "adapter", out=tmp_path / "out")
    assert digest(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_a_stale_file_beside_the_shards_counts_for_nothing(base: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(base, tmp_path / "base"))
    old = {"model.norm.weight": torch.zeros(32)}
    save_file(old, mine / "model.old.safetensors")
    expected = tuned(base, tmp_path / "adapter", target_modules=LINEAR)
    ps.merge(mine, tmp_path / "adapter", out=tmp_path / "out")
    assert not (tmp_path / "out" / "model.old.safetensors").exists()
    assert close(logits(loaded(tmp_path / "out")), expected)


def test_merging_again_reads_the_adapter_again(base: Path, tmp_path: Path) -> None:
    """No cache knows yesterday's adapter."""
    for run in range(2):
        shutil.rmtree(tmp_path / "adapter", ignore_errors=True)
        expected = tuned(base, tmp_path / "adapter", target_modules=LINEAR[run:])
        ps.merge(base, tmp_path / "adapter", out=tmp_path / f"out{run}")
        assert close(logits(loaded(tmp_path / f"out{run}")), expected)


def test_files_are_as_readable_as_those_of_the_base(base: Path, tmp_path: Path) -> None:
    """safetensors writes 0600, whatever the umask and the base say."""
    mine = Path(shutil.copytree(base, tmp_path / "base"))
    tuned(base, tmp_path / "adapter", target_modules=LINEAR)
    for mode in (0o600, 0o644):
        for file in mine.glob("*.safetensors"):
            file.chmod(mode)
        ps.merge(mine, tmp_path / "adapter", out=tmp_path / f"out{mode}")
        made = (tmp_path / f"out{mode}").glob("*.safetensors")
        assert {stat.S_IMODE(file.stat().st_mode) for file in made} == {mode}


def test_over_the_base_is_refused(base: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(base, tmp_path / "base"))
    tuned(base, tmp_path / "adapter", target_modules=LINEAR)
    before = digest(mine)
    with pytest.raises(ps.SurgeryError, match="never overwrites its base"):
        ps.merge(mine, tmp_path / "adapter", out=mine)
    assert digest(mine) == before


QUANTISERS = ["bitsandbytes", "gptq", "awq", "fp8", "compressed-tensors", "torchao", "mxfp4"]


@pytest.mark.parametrize("method", QUANTISERS)
def test_a_base_that_says_it_is_quantised_is_refused(method: str, base: Path, tmp_path: Path) -> None:
    """What its tensors look like is told in the tests of merging on disk."""
    mine = Path(shutil.copytree(base, tmp_path / "base"))
    config = json.loads((mine / "config.json").read_text())
    said = {**config, "quantization_config": {"quant_method": method, "bits": 4}}
    (mine / "config.json").write_text(json.dumps(said))
    tuned(base, tmp_path / "adapter", target_modules=LINEAR)
    with pytest.raises(
        PlanError, match=f"'{method}'.*Merge into the unquantised base .* quantise the result"
    ):
        ps.merge(mine, tmp_path / "adapter", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
