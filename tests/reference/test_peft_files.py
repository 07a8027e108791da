"""PEFT reads what we write, and we read what PEFT writes: outputs agree, tensors are the same."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import peftsurgery as ps
from peftsurgery.disk import peft as files
from peftsurgery.methods import METHODS
from peftsurgery.site import Kind, Layout

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = torch.arange(12).reshape(2, 6)


def bert() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 3}
    config = transformers.BertConfig(vocab_size=20, num_labels=3, **sizes)
    return transformers.BertForSequenceClassification(config)


def roberta() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = transformers.RobertaConfig(vocab_size=20, num_labels=3, pad_token_id=19, **sizes)
    return transformers.RobertaForSequenceClassification(config)


def distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(vocab_size=20, dim=16, hidden_dim=24, n_heads=2, n_layers=1)
    return transformers.DistilBertForSequenceClassification(config)


def gpt2() -> nn.Module:
    sizes = {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 16}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=20, **sizes, **ends))


def llama() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, **sizes, **ends))


class Vision(nn.Module):
    """Convolutions of every rank, and a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(3, 4, 3)
        self.plane = nn.Conv2d(3, 4, (3, 2), stride=2)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.reshape(2, 1, 1, 6).expand(2, 3, 4, 6) * 0.1
        return self.head(self.plane(y).mean((2, 3)) + self.line(y.flatten(2)).mean(2))


SUBJECTS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "plain": (bert, {"target_modules": ["query", "value"], "lora_alpha": 12}),
    "head": (bert, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "lora_dropout": 0.1}),
    "head of several maps": (roberta, {"target_modules": ["key"], "task_type": "SEQ_CLS"}),
    "head found by the end of its name": (distilbert, {"target_modules": ["q_lin"], "task_type": "SEQ_CLS"}),
    "a module to save": (bert, {"target_modules": ["key"], "modules_to_save": ["pooler"]}),
    "rslora": (bert, {"target_modules": "all-linear", "use_rslora": True, "init_lora_weights": "gaussian"}),
    "lora_bias": (bert, {"target_modules": ["dense"], "lora_bias": True, "r": 3}),
    "bias lora_only": (bert, {"target_modules": ["query"], "bias": "lora_only"}),
    "bias all": (bert, {"target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"}),
    "bias all, head of several maps": (
        roberta,
        {"target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"},
    ),
    "embedding": (bert, {"target_modules": ["word_embeddings", "query"], "r": 2}),
    "embedding saved whole": (
        llama,
        {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["lm_head"]},
    ),
    "Conv1D": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "Conv1D without being told": (gpt2, {"target_modules": ["c_attn"]}),
    "convolutions": (Vision, {"target_modules": ["line", "plane", "head"], "r": 2}),
    "patterns": (
        bert,
        {
            "target_modules": ["query", "key", "output.dense"],
            "rank_pattern": {"query": 4, r"layer\.1\.attention\.output\.dense": 2, "no_such": 9},
            "alpha_pattern": {"^bert.encoder.layer.0.attention.self.key": 3.5},
        },
    ),
    "layers": (
        bert,
        {"target_modules": ["query"], "layers_to_transform": [0, 2], "layers_pattern": "layer"},
    ),
    "regular expression": (
        bert,
        {
            "target_modules": r".*\.(query|key)",
            "exclude_modules": r".*layer\.0.*",
            "init_lora_weights": "orthogonal",
        },
    ),
    "exclusions": (bert, {"target_modules": ["query"], "exclude_modules": ["layer.1.attention.self.query"]}),
}


@pytest.fixture(params=SUBJECTS, scope="module")
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[nn.Module, Any, Path]:
    """A base, PEFT's model on a copy of it with every trainable tensor moved, and what PEFT saved of it."""
    make, options = SUBJECTS[request.param]
    torch.manual_seed(0)
    base = make().eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(3).add_(torch.randn_like(parameter) * 0.2)
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.5)
    directory = tmp_path_factory.mktemp("peft")
    model.save_pretrained(directory)
    return base, model, directory


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found = model(TOKENS)
    return getattr(found, "logits", found)


def test_what_we_write_peft_loads_and_computes_the_same(saved: Any, tmp_path: Path) -> None:
    base, model, directory = saved
    files.write(files.read(directory, METHODS), tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    expected = output(model)
    assert not torch.allclose(expected, output(base), atol=1e-4)
    torch.testing.assert_close(output(again), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("make", "target"), [(bert, "query"), (roberta, "query"), (distilbert, "q_lin")])
def test_what_we_inject_and_save_peft_loads(
    make: Callable[[], nn.Module], target: str, tmp_path: Path
) -> None:
    base = make().eval()
    model = ps.inject(copy.deepcopy(base), ps.LoRA(r=2), targets=target, task="seq-cls")
    with torch.no_grad():
        for parameter in ps.trainable_parameters(model).values():
            parameter.add_(torch.randn_like(parameter))
    expected = output(model)
    files.write(ps.remove(model, "default"), tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert not torch.allclose(expected, output(base), atol=1e-4)
    torch.testing.assert_close(output(again), expected, rtol=0, atol=1e-6)


def test_every_tensor_that_peft_saved_is_read(saved: Any) -> None:
    _, model, directory = saved
    adapter = files.read(directory, METHODS)
    tensors = load_file(directory / files.TENSORS)
    ours = {f"base_model.model.{name}": tensor for name, tensor in adapter.tensors()}
    for key, tensor in tensors.items():
        plain = key.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        if ".original_module." not in key:
            assert torch.equal(ours.pop(plain, tensor), tensor)
    assert ours == {}
    layers = {name for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert {site.name for site in adapter.plan.sites} == layers


def test_each_site_has_the_rank_and_scale_that_peft_gave_it(saved: Any) -> None:
    _, model, directory = saved
    for step in files.read(directory, METHODS).plan.steps:
        layer = model.base_model.model.get_submodule(step.site.name)
        assert (step.method.r, step.method.scaling) == (layer.r["default"], layer.scaling["default"])


def test_sites_are_what_the_model_says_they_are(saved: Any) -> None:
    base, _, directory = saved
    told = json.loads((directory / files.CONFIG).read_text())["fan_in_fan_out"]
    for site in files.read(directory, METHODS).plan.sites:
        module = base.get_submodule(site.name)
        conv1d = type(module).__name__ == "Conv1D"
        shape = tuple(module.weight.shape)
        assert site.shape == (shape[::-1] if conv1d and not told else shape)
        assert (site.kind is Kind.EMBEDDING) == isinstance(module, nn.Embedding)
        assert (site.kind is Kind.CONV) == isinstance(module, nn.Conv1d | nn.Conv2d)
        assert site.kind is not Kind.LINEAR or (site.layout is Layout.IN_OUT) == told


def test_writing_and_reading_is_the_identity(saved: Any, tmp_path: Path) -> None:
    adapter = files.read(saved[2], METHODS)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    files.write(adapter, tmp_path / "a")
    again = files.read(tmp_path / "a", METHODS)
    files.write(again, tmp_path / "b")
    assert again == adapter
    assert (again.plan, again.base, again.replaced.keys()) == (
        adapter.plan,
        adapter.base,
        adapter.replaced.keys(),
    )
    for name in (files.CONFIG, files.TENSORS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
