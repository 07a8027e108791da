"""Reading PEFT's adapter directory: what is understood, and what is refused in which words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peftsurgery import load_adapter
from peftsurgery.adapter import Adapter, fingerprint
from peftsurgery.disk import peft as files
from peftsurgery.errors import (
    AdapterError,
    MismatchedTensors,
    NonFiniteWeight,
    TruncatedShard,
    UnknownMethod,
    UntrustedPickle,
)
from peftsurgery.lazy import Lazy
from peftsurgery.methods import METHODS
from peftsurgery.site import Kind

FIXTURES = Path(__file__).parents[2] / "fixtures"
Change = Callable[[dict[str, Tensor]], object]
QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query."


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A copy of the real adapter, to be spoilt."""
    shutil.copytree(FIXTURES / "minilm_lora", tmp_path / "adapter")
    return tmp_path / "adapter"


def reconfigure(directory: Path, **changes: Any) -> None:
    path = directory / files.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def retensor(directory: Path, change: Change) -> None:
    tensors = load_file(directory / files.TENSORS)
    change(tensors)
    save_file(tensors, directory / files.TENSORS)


def read(directory: Path, **options: Any) -> Adapter:
    return files.read(directory, METHODS, **options)


@pytest.mark.parametrize(
    ("name", "sites", "heads"),
    [("minilm_lora", 12, ["classifier.bias", "classifier.weight"]), ("stories260k_lora", 10, [])],
)
def test_real_adapters_are_read(name: str, sites: int, heads: list[str]) -> None:
    adapter = read(FIXTURES / name)
    assert len(adapter.plan.steps) == sites
    assert sum(adapter.plan.hits.values()) == sites
    assert list(adapter.replaced) == heads
    assert {step.method.r for step in adapter.plan.steps} == {8}
    assert {step.site.kind for step in adapter.plan.steps} == {Kind.LINEAR}
    stored = load_file(FIXTURES / name / files.TENSORS)
    assert {f"base_model.model.{key}" for key, _ in adapter.tensors()} == stored.keys()
    assert all(torch.equal(stored[f"base_model.model.{key}"], tensor) for key, tensor in adapter.tensors())


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"peft_type": "VERA"}, UnknownMethod, "'VERA'.*reads 'LORA'"),
        ({"peft_type": None}, UnknownMethod, "None"),
        ({"use_dora": True}, UnknownMethod, "`use_dora`"),
        ({"layer_replication": [[0, 2]]}, UnknownMethod, "`layer_replication`"),
        ({"target_parameters": ["experts.w"]}, UnknownMethod, "`target_parameters`"),
        ({"trainable_token_indices": [1]}, UnknownMethod, "`trainable_token_indices`"),
        ({"an_option_of_tomorrow": 3}, UnknownMethod, "`an_option_of_tomorrow`"),
        ({"init_lora_weights": "pissa_niter_4"}, UnknownMethod, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, UnknownMethod, "changes the base"),
        ({"init_lora_weights": "of tomorrow"}, AdapterError, "of tomorrow"),
        ({"r": 0}, AdapterError, "r is 0"),
        ({"r": "8"}, AdapterError, "`r` is '8'"),
        ({"r": True}, AdapterError, "`r` is True"),
        ({"r": 8.5}, AdapterError, "`r` is 8.5"),
        ({"use_rslora": 1}, AdapterError, "`use_rslora`"),
        ({"lora_alpha": float("nan")}, AdapterError, "lora_alpha is nan"),
        ({"lora_alpha": 10**400}, AdapterError, "no adapter means"),
        ({"lora_dropout": 1.5}, AdapterError, "lora_dropout"),
        ({"bias": "some"}, AdapterError, "`bias`"),
        ({"target_modules": 3}, AdapterError, "names no modules"),
        ({"target_modules": ["query", 3]}, AdapterError, "names no modules"),
        ({"target_modules": "(query"}, AdapterError, "no regular expression"),
        ({"layers_to_transform": ["x"]}, AdapterError, "names no layers"),
        ({"layers_pattern": "layer"}, AdapterError, "comes without layers"),
        ({"modules_to_save": "classifier"}, AdapterError, "`modules_to_save`"),
        ({"rank_pattern": ["query"]}, AdapterError, "`rank_pattern`"),
        ({"rank_pattern": {"query": "4"}}, AdapterError, "`rank_pattern`"),
        ({"rank_pattern": {"(query": 4}}, AdapterError, "no regular expression"),
        ({"rank_pattern": {"query": 4}}, MismatchedTensors, "has shape \\(8, 384\\).*takes \\(4, 384\\)"),
        ({"r": 4}, MismatchedTensors, "has shape"),
        ({"target_modules": ["query"]}, MismatchedTensors, "'query'.* do not select"),
        ({"layers_to_transform": [0, 1]}, MismatchedTensors, "do not select"),
        ({"exclude_modules": ["layer.2.attention.self.query"]}, MismatchedTensors, r"layer\.2\.attention"),
        (
            {"modules_to_save": None},
            MismatchedTensors,
            "'base_model.model.classifier.bias'.*`modules_to_save`",
        ),
        ({"lora_bias": True}, MismatchedTensors, "lacks 'base_model.*lora_B.bias'"),
    ],
)
def test_configurations_that_are_refused(directory: Path, changes: Any, error: type, said: str) -> None:
    reconfigure(directory, **changes)
    with pytest.raises(error, match=said):
        read(directory)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": False, "layer_replication": None, "loftq_config": {}, "megatron_core": "megatron.core"},
        {"an_option_of_tomorrow": None},
        {"eva_config": {"rho": 2.0}, "init_lora_weights": "eva"},
        {"init_lora_weights": False},
        {"auto_mapping": {"base_model_class": "X"}, "revision": "main", "peft_version": "9.0"},
        {"target_modules": "all-linear"},
        {"target_modules": r".*(query|value)"},
        {"target_modules": None},
        {"rank_pattern": {"no_such_module": 4}},
        {"layers_to_transform": list(range(6)), "layers_pattern": ["layer"]},
        {"target_modules": ["query", "value", "misspelt"]},
    ],
)
def test_configurations_that_change_nothing(directory: Path, changes: Any) -> None:
    expected = read(directory)
    reconfigure(directory, **changes)
    assert read(directory) == expected


def drop(key: str) -> Change:
    return lambda tensors: tensors.pop(key)


def put(key: str, *shape: int) -> Change:
    return lambda tensors: tensors.update({key: torch.ones(shape)})


def fill(key: str, value: float) -> Change:
    return lambda tensors: tensors[key].fill_(value)


def rename(old: str, new: str) -> Change:
    return lambda tensors: tensors.update({key.replace(old, new): tensors.pop(key) for key in list(tensors)})


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (
            drop(QUERY + "lora_B.weight"),
            MismatchedTensors,
            r"lacks '.*0\.attention\.self\.query\.lora_B\.weight'",
        ),
        (
            drop(QUERY + "lora_A.weight"),
            MismatchedTensors,
            r"lacks '.*0\.attention\.self\.query\.lora_A\.weight'",
        ),
        (
            rename("query.lora_A", "query.lora_a"),
            MismatchedTensors,
            r"query\.lora_a\.weight.*does not announce",
        ),
        (rename("base_model.model.", ""), MismatchedTensors, "does not announce"),
        (
            rename("lora_A.weight", "lora_A.default.weight"),
            MismatchedTensors,
            "`peftsurgery remove CHECKPOINT",
        ),
        (put("stray", 2), MismatchedTensors, "'stray'"),
        (put("base_model.model.pooler.bias", 2), MismatchedTensors, r"pooler\.bias"),
        (put(QUERY + "lora_magnitude_vector", 384), MismatchedTensors, "magnitude"),
        (put(QUERY + "lora_B.weight", 384), MismatchedTensors, r"has shape \(384,\)"),
        (put(QUERY + "lora_B.weight", 384, 7), MismatchedTensors, "has shape"),
        (fill(QUERY + "lora_B.weight", torch.nan), NonFiniteWeight, r"query\.lora_B\.weight' .*NaN"),
        (fill("base_model.model.classifier.bias", torch.inf), NonFiniteWeight, r"classifier\.bias"),
        (lambda t: t.update({k: v.to(torch.int8) for k, v in t.items()}), MismatchedTensors, "torch.int8"),
        (lambda t: t.clear(), MismatchedTensors, "holds no tensor of LORA"),
    ],
)
def test_tensors_that_are_refused(directory: Path, change: Change, error: type, said: str) -> None:
    retensor(directory, change)
    with pytest.raises(error, match=said):
        read(directory)


def test_what_is_missing_and_unexpected_is_named(directory: Path) -> None:
    retensor(directory, rename("layer.0.attention.self.query.lora_A", "layer.0.attention.self.query.lora_C"))
    with pytest.raises(MismatchedTensors, match=r"Nearest: '.*lora_A\.weight'") as caught:
        read(directory)
    assert caught.value.missing == (QUERY + "lora_A.weight",)
    assert caught.value.unexpected == (QUERY + "lora_C.weight",)


def test_a_whole_tensor_said_twice_must_be_said_the_same(directory: Path) -> None:
    key = "base_model.model.classifier.modules_to_save.default.bias"
    retensor(
        directory, lambda tensors: tensors.update({key: tensors["base_model.model.classifier.bias"].clone()})
    )
    assert list(read(directory).replaced) == ["classifier.bias", "classifier.weight"]
    retensor(directory, fill(key, 7.0))
    with pytest.raises(MismatchedTensors, match=r"'classifier\.bias' twice"):
        read(directory)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    "spoil", [shorten, lambda path: path.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")]
)
def test_a_broken_tensor_file_is_refused(directory: Path, spoil: Callable[[Path], None]) -> None:
    spoil(directory / files.TENSORS)
    with pytest.raises(TruncatedShard, match="adapter_model"):
        read(directory)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", "[" * 100_000])
def test_a_broken_configuration_is_refused(directory: Path, text: str) -> None:
    (directory / files.CONFIG).write_text(text, encoding="latin-1")
    with pytest.raises(AdapterError, match=r"adapter_config\.json (is no JSON|holds no JSON object)"):
        read(directory)


def test_a_directory_that_is_no_adapters_says_what_one_holds(tmp_path: Path, directory: Path) -> None:
    holds = r"holds adapter_config\.json and adapter_model\.safetensors"
    with pytest.raises(AdapterError, match=f"is no directory.*{holds}"):
        read(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match=holds):
        read(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(AdapterError, match="it holds a model"):
        read(tmp_path)
    (directory / files.TENSORS).unlink()
    with pytest.raises(AdapterError, match=r"but no adapter_model\.safetensors"):
        read(directory)


def test_a_pickle_is_read_only_when_asked_for(directory: Path) -> None:
    expected = read(directory).held()  # what lies in the file is read when it is needed
    torch.save(load_file(directory / files.TENSORS), directory / files.PICKLE)
    assert read(directory, allow_pickle=True) == expected
    (directory / files.TENSORS).unlink()
    with pytest.raises(UntrustedPickle, match="--allow-pickle"):
        read(directory)
    assert read(directory, allow_pickle=True) == expected


class Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("harm"),)


@pytest.mark.parametrize(
    ("content", "error"),
    [(Harm(), UntrustedPickle), ([torch.ones(2)], AdapterError), ({"a": 1}, AdapterError)],
)
def test_a_pickle_of_more_than_tensors_is_refused(
    directory: Path, monkeypatch: pytest.MonkeyPatch, content: object, error: type
) -> None:
    monkeypatch.chdir(directory)
    (directory / files.TENSORS).unlink()
    torch.save(content, directory / files.PICKLE)
    with pytest.raises(error):
        read(directory, allow_pickle=True)
    assert not Path("harm").exists()


def test_a_truncated_pickle_is_refused(directory: Path) -> None:
    torch.save(load_file(directory / files.TENSORS), directory / files.PICKLE)
    (directory / files.TENSORS).unlink()
    shorten(directory / files.PICKLE)
    with pytest.raises(TruncatedShard):
        read(directory, allow_pickle=True)


def test_what_was_loaded_does_not_hang_on_the_file(directory: Path) -> None:
    adapter = load_adapter(directory)
    before = {name: tensor.clone() for name, tensor in adapter.tensors()}
    with (directory / files.TENSORS).open("r+b") as file:
        file.truncate(0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.tensors())


def test_what_is_folded_stays_in_its_file_until_it_is_needed(directory: Path) -> None:
    expected, adapter = read(directory).held(), read(directory)
    for site, params in adapter.params.items():
        assert isinstance(params, Lazy)
        assert params["lora_A.weight"] is not params["lora_A.weight"], "it is read again, and held by nobody"
        assert torch.equal(params["lora_A.weight"], expected.params[site]["lora_A.weight"])
    assert fingerprint(adapter) == fingerprint(expected)
    (directory / files.TENSORS).write_bytes(b"")
    with pytest.raises(TruncatedShard, match="changed while it was being read"):
        fingerprint(adapter)
