"""A checkpoint saved with tuners inside comes apart: the base as it was, the adapter as PEFT saves it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peftsurgery.disk.checkpoint import INDEX, load, open_checkpoint
from peftsurgery.disk.durable import staged
from peftsurgery.disk.extract import PREFIX, Dissection, dissect, extract
from peftsurgery.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(8, 6)
        self.value = nn.Linear(8, 8, bias=False)
        self.norm = nn.LayerNorm(8)


class Model(nn.Module):
    """An embedding, two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([Block(), Block()])
        self.mix = nn.Conv2d(2, 3, 3)
        self.classifier = nn.Linear(8, 3)


HEAD = {"modules_to_save": ["classifier"]}
CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=2, target_modules=["query", "value"]),
    "lora with a head": lambda: peft.LoraConfig(r=2, target_modules=["query"], **HEAD),
    "lora everywhere": lambda: peft.LoraConfig(r=2, target_modules=["query", "table", "mix"], **HEAD),
    "lora_bias": lambda: peft.LoraConfig(r=2, target_modules=["query"], lora_bias=True),
    "dora": lambda: peft.LoraConfig(r=2, target_modules=["query", "mix"], use_dora=True),
    "ia3": lambda: peft.IA3Config(target_modules=["query"], feedforward_modules=[], **HEAD),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=["query", "mix"]),
    "lokr": lambda: peft.LoKrConfig(r=2, target_modules=["query"]),
}


def tuned(config: Callable[[], Any], *names: str) -> tuple[dict[str, Tensor], Any]:
    """The base's own state, and the model in PEFT's hands with every trainable tensor moved."""
    torch.manual_seed(0)
    model = Model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapped = peft.get_peft_model(model, config(), adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, config())
    for _, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return before, wrapped


def values(held: Mapping[str, str], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: state[stored] for name, stored in held.items()}


def assert_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("outer", [True, False], ids=["the PeftModel's", "the model's"])
@pytest.mark.parametrize("config", CONFIGS)
def test_the_parts_are_the_base_and_what_peft_saves(config: str, outer: bool) -> None:
    before, wrapped = tuned(CONFIGS[config], "default")
    state = wrapped.state_dict() if outer else wrapped.base_model.model.state_dict()
    assert any(name.startswith(PREFIX) for name in state) is outer
    found = dissect(state)
    assert_same(values(found.base, state), before)
    assert found.adapters.keys() == {"default"}
    assert_same(values(found.adapters["default"], state), peft.get_peft_model_state_dict(wrapped))


def test_several_adapters_are_told_apart() -> None:
    before, wrapped = tuned(CONFIGS["lora with a head"], "default", "other", "b_2")
    state = wrapped.state_dict()
    found = dissect(state)
    assert_same(values(found.base, state), before)
    assert list(found.adapters) == ["default", "other", "b_2"]
    for name, held in found.adapters.items():
        assert_same(values(held, state), peft.get_peft_model_state_dict(wrapped, adapter_name=name))


def test_an_adapter_may_be_called_like_a_module() -> None:
    names = ["query.base_layer.weight", "query.lora_A.query.weight", "query.lora_A.weight.weight"]
    found = dissect(names)
    key = f"{PREFIX}query.lora_A.weight"
    assert found.adapters == {"query": {key: names[1]}, "weight": {key: names[2]}}
    assert found.base == {"query.weight": names[0]}


def test_experts_that_are_tuned_one_around_the_other_come_apart() -> None:
    """PEFT nests one tuner per parameter of a module around the last (`target_parameters`)."""
    names = {
        "e.base_layer.base_layer.up": "e.up",
        "e.base_layer.base_layer.down": "e.down",
        "e.base_layer.lora_A.default.weight": f"{PREFIX}e.base_layer.lora_A.weight",
        "e.lora_A.default.weight": f"{PREFIX}e.lora_A.weight",
        "e.base_layer.scale.default": f"{PREFIX}e.base_layer.scale",
    }
    base = {own: stored for stored, own in names.items() if not own.startswith(PREFIX)}
    adapter = {key: stored for stored, key in names.items() if key.startswith(PREFIX)}
    assert dissect(names) == Dissection(base, {"default": adapter})


def test_a_tuner_whose_tied_base_was_dropped_is_still_a_tuners() -> None:
    names = [
        "embed_tokens.weight",
        "lm_head.lora_A.default.weight",
        "lm_head.lora_B.default.weight",
        "score.modules_to_save.default.weight",
    ]
    found = dissect(PREFIX + name for name in names)
    assert found.base == {"embed_tokens.weight": f"{PREFIX}embed_tokens.weight"}
    assert set(found.adapters["default"]) == {
        f"{PREFIX}lm_head.lora_A.weight",
        f"{PREFIX}lm_head.lora_B.weight",
        f"{PREFIX}score.weight",
    }


def test_a_clean_checkpoint_is_said_to_be_clean() -> None:
    with pytest.raises(CheckpointError, match="clean already"):
        dissect(Model().state_dict())


def test_two_tensors_of_one_name_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"are both 'q\.weight'"):
        dissect(["q.weight", "q.base_layer.weight", "q.lora_A.default.weight"])
    with pytest.raises(CheckpointError, match=r"'q\.weight'"):
        dissect(["q.weight", f"{PREFIX}q.weight", "q.lora_A.default.weight"])


@pytest.mark.parametrize("shards", [1, 3])
def test_the_clean_base_is_written_bit_for_bit(shards: int, tmp_path: Path) -> None:
    before, wrapped = tuned(CONFIGS["lora with a head"], "default")
    state = wrapped.state_dict()
    saved(state, tmp_path, shards)
    checkpoint = open_checkpoint(tmp_path)
    found = dissect(checkpoint.tensors)
    with staged(tmp_path / "clean") as directory:
        done = extract(checkpoint, found, directory)
    clean = open_checkpoint(tmp_path / "clean")
    assert clean.indexed is (shards > 1)
    assert_same({name: load(stored) for name, stored in clean.tensors.items()}, before)
    assert (done.num_tensors, done.nbytes) == (len(before), sum(tensor.nbytes for tensor in before.values()))
    assert {file.name for file in (tmp_path / "clean").iterdir()} == set(done.files)
    held = {key: load(checkpoint.tensors[stored]) for key, stored in found.adapters["default"].items()}
    assert_same(held, peft.get_peft_model_state_dict(wrapped))


def saved(state: Mapping[str, Tensor], path: Path, shards: int) -> None:
    """`state` in one file, or in some with an index; the last one holds tuner tensors only."""
    if shards == 1:
        save_file(dict(state), path / "model.safetensors")
        return
    names = sorted(state, key=lambda name: "lora_" in name)
    own = sum("lora_" not in name for name in names)
    cuts = [names[: own // 2], names[own // 2 : own + 1], names[own + 1 :]]
    for number, held in enumerate(cuts):
        save_file({name: state[name] for name in held}, path / f"model-{number}.safetensors")
    places = {name: f"model-{number}.safetensors" for number, held in enumerate(cuts) for name in held}
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_the_clean_base_loads_as_it_was(tmp_path: Path) -> None:
    before, wrapped = tuned(CONFIGS["lora everywhere"], "default")
    save_file(wrapped.state_dict(), tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    with staged(tmp_path / "clean") as directory:
        extract(checkpoint, dissect(checkpoint.tensors), directory)
    model = Model()
    model.load_state_dict(load_file(tmp_path / "clean" / "model.safetensors"), strict=True)
    assert_same(model.state_dict(), before)
