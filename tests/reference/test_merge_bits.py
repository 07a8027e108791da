"""Our merge on disk is, bit for bit, what PEFT's merge_and_unload leaves in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model

from peftsurgery.adapter import Adapter, check
from peftsurgery.disk.checkpoint import open_checkpoint
from peftsurgery.live.sites import sites
from peftsurgery.methods.lora import LoRA
from peftsurgery.planning import Plan, Step
from peftsurgery.workers import alone
from tests.merging import merge

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Planes(nn.Module):
    """Two convolutions and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(16, 24, 3, padding=1)
        self.mix = nn.Conv2d(24, 40, 1)
        self.line = nn.Conv1d(40, 24, 3)
        self.head = nn.Linear(24, 7)


class Stack(nn.Module):
    """Linear maps, with and without bias, behind an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(211, 48)
        self.query = nn.Linear(48, 96)
        self.value = nn.Linear(96, 52, bias=False)


def gpt2() -> nn.Module:
    return GPT2Model(GPT2Config(n_layer=2, n_embd=48, n_head=4, vocab_size=89, n_positions=16))


@dataclass(frozen=True)
class Case:
    """A base, and what PEFT puts on it."""

    name: str
    base: Callable[[], nn.Module]
    targets: tuple[str, ...]
    options: Mapping[str, Any]

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("linear", Stack, ("query", "value"), {"r": 16, "lora_alpha": 11}),
    Case("scaled by a power of two", Stack, ("query", "value"), {"r": 16, "lora_alpha": 32}),
    Case("rslora", Stack, ("query", "value"), {"r": 7, "lora_alpha": 5, "use_rslora": True}),
    Case("lora_bias", Stack, ("query",), {"r": 4, "lora_alpha": 3, "lora_bias": True}),
    Case("conv1d", gpt2, ("c_attn", "c_proj", "c_fc"), {"r": 8, "lora_alpha": 12}),
    Case(
        "patterns",
        gpt2,
        ("c_attn", "c_proj"),
        {"r": 8, "lora_alpha": 12, "rank_pattern": {"h.1.attn.c_attn": 3}, "alpha_pattern": {"c_proj": 5}},
    ),
    Case("convolution", Planes, ("wide", "mix", "line", "head"), {"r": 6, "lora_alpha": 9}),
]
EMBEDDING = Case("embedding", Stack, ("table", "query"), {"r": 8, "lora_alpha": 20})


def tuned(case: Case, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """The base, and a copy of it in PEFT's hands with every parameter away from its start."""
    torch.manual_seed(0)
    base = case.base().to(dtype)
    copy = case.base().to(dtype)
    copy.load_state_dict(base.state_dict())
    model = peft.get_peft_model(copy, peft.LoraConfig(target_modules=list(case.targets), **case.options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return base, model


def adapter_of(model: Any, base: nn.Module) -> Adapter:
    """What PEFT holds, said in our words."""
    saved = peft.get_peft_model_state_dict(model)
    steps, params = [], {}
    for site in sites(base):
        prefix = f"base_model.model.{site.name}."
        found = {key.removeprefix(prefix): value for key, value in saved.items() if key.startswith(prefix)}
        if found:
            layer = model.base_model.model.get_submodule(site.name)
            steps.append(Step(site, method_of(layer, model.peft_config["default"])))
            params[site.name] = found
    return check(Adapter(Plan(tuple(steps)), params))


def method_of(layer: Any, config: Any) -> LoRA:
    return LoRA(
        r=layer.r["default"],
        lora_alpha=layer.lora_alpha["default"],
        use_rslora=config.use_rslora,
        lora_bias=config.lora_bias,
    )


def merged_on_disk(base: nn.Module, adapter: Adapter, room: Path) -> dict[str, Tensor]:
    (room / "base").mkdir()
    (room / "out").mkdir()
    save_file({k: v.contiguous() for k, v in base.state_dict().items()}, room / "base" / "model.safetensors")
    done = merge(open_checkpoint(room / "base"), [adapter], room / "out")
    assert set(done.folded) >= {step.site.weight for step in adapter.plan.steps}
    return load_file(room / "out" / "model.safetensors")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_bit_is_pefts(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    base, model = tuned(case, dtype)
    ours = merged_on_disk(base, adapter_of(model, base), tmp_path)
    with alone():  # several threads that share a product can change its last bit
        theirs = model.merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype is dtype
        assert torch.equal(ours[name], tensor), name
    assert not all(torch.equal(ours[name], before) for name, before in base.state_dict().items())


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_an_embedding_is_rounded_once_where_peft_rounds_twice(dtype: torch.dtype, tmp_path: Path) -> None:
    """PEFT rounds an embedding's delta to the base's dtype before it adds it; in float32 that is the same."""
    base, model = tuned(EMBEDDING, dtype)
    adapter = adapter_of(model, base)
    ours = merged_on_disk(base, adapter, tmp_path)["table.weight"]
    theirs = model.merge_and_unload().state_dict()["table.weight"]
    before, delta = base.get_submodule("table").weight.detach(), embedding_delta(adapter)
    assert torch.equal(theirs, before + delta.to(dtype))
    assert torch.equal(ours, (before.float() + delta).to(dtype))
    wrong, wrong_theirs = (
        misrounded(x, before.double() + embedding_delta(adapter, torch.float64)) for x in (ours, theirs)
    )
    assert torch.equal(ours, theirs) if dtype is torch.float32 else wrong < 0.001 < 0.2 < wrong_theirs


def embedding_delta(adapter: Adapter, dtype: torch.dtype = torch.float32) -> Tensor:
    p = adapter.params["table"]
    method = next(step.method for step in adapter.plan.steps if step.site.name == "table")
    assert isinstance(method, LoRA)
    return (p["lora_embedding_B"].to(dtype) @ p["lora_embedding_A"].to(dtype)).t() * method.scaling


def misrounded(tensor: Tensor, truth: Tensor) -> float:
    """The share of elements that are not the correctly rounded truth."""
    return float((tensor != truth.to(tensor.dtype)).double().mean())
