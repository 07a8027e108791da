"""Damaged, incomplete and strange directories of AdapterHub's, and adapters that its format cannot say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import peftsurgery as ps
from fixtures.adapterhub.ours import CASES, HOULSBY, single
from peftsurgery.errors import (
    AdapterError,
    MismatchedTensors,
    NonFiniteWeight,
    SurgeryError,
    TruncatedShard,
    UnknownMethod,
    UntrustedPickle,
)

THEIRS, OURS = Path("fixtures/adapterhub/theirs"), Path("fixtures/adapterhub/ours")
Words = Callable[[dict[str, Any]], object]
Tensors = Callable[[dict[str, Tensor]], object]


def copied(case: str, to: Path, *, words: Words | None = None, tensors: Tensors | None = None) -> Path:
    """A copy of a directory with another configuration or other tensors."""
    path = Path(shutil.copytree(THEIRS / case, to / "adapter"))
    if words is not None:
        change_json(path / "adapter_config.json", words)
    if tensors is not None:
        held = load_file(path / "adapter.safetensors")
        tensors(held)
        save_file(held, path / "adapter.safetensors")
    return path


def change_json(file: Path, words: Words) -> None:
    raw = json.loads(file.read_text())
    words(raw)
    file.write_text(json.dumps(raw))


def key(held: dict[str, Tensor], end: str) -> str:
    return next(name for name in sorted(held) if name.endswith(end))


LAYERS = "bert.encoder.layer"
UP = "adapter_up.bias"


def with_(*keys: str, value: Tensor | None = None) -> Tensors:
    """One more tensor, or several; or others in their place."""
    return lambda held: held.update({name: torch.ones(2, 2) if value is None else value for name in keys})


def without(part: str) -> Tensors:
    return lambda held: [held.pop(name) for name in list(held) if part in name]


def instead(end: str, value: Tensor) -> Tensors:
    return lambda held: held.update({key(held, end): value})


DENSE = [f"{LAYERS}.{n}.attention.output.dense.loras.one.lora_{x}" for n in (0, 1) for x in "AB"]
TENSORS: dict[str, tuple[str, Tensors, str]] = {
    "missing parameter": ("bert-double", without(f"layer.0.output.adapters.one.{UP}"), UP),
    "missing place": ("bert-double", without("layer.1.output."), r"layer\.1\.output"),
    "missing layer": ("bert-single", without(".layer.0."), r"layer\.0\.output"),
    "unexpected parameter": ("bert-double", with_(f"{LAYERS}.0.output.adapters.one.x"), "'x'"),
    "another adapter": ("bert-double", with_(f"{LAYERS}.0.output.adapters.two.{UP}"), "two"),
    "another place": ("bert-double", with_(f"bert.pooler.adapters.one.{UP}"), "no layer"),
    "misshapen": ("bert-double", instead(UP, torch.ones(3)), "shape"),
    "whole numbers": ("bert-double", instead(UP, torch.ones(16, dtype=torch.int64)), "no tensor of"),
    "half a lora": ("bert-lora", without("layer.0.attention.self.query.loras.one.lora_B"), "lora_B"),
    "a wider lora": ("gpt2-lora", instead("lora_A", torch.ones(5, 16)), "announces rank"),
    "a lora elsewhere": ("bert-lora", with_(*DENSE), "does not name"),
    "nothing": ("bert-lora", lambda held: held.clear(), "nothing"),
}


@pytest.mark.parametrize("fault", TENSORS)
def test_tensors_that_are_not_announced(fault: str, tmp_path: Path) -> None:
    case, change, message = TENSORS[fault]
    with pytest.raises(MismatchedTensors, match=message):
        ps.load_adapter(copied(case, tmp_path, tensors=change))


def test_numbers_that_are_none(tmp_path: Path) -> None:
    path = copied("bert-double", tmp_path, tensors=lambda t: t[key(t, "adapter_up.bias")].fill_(float("nan")))
    with pytest.raises(NonFiniteWeight, match=r"adapter_up\.bias"):
        ps.load_adapter(path)


def said(option: str, value: object) -> Words:
    return lambda raw: raw["config"].update({option: value})


WORDS: dict[str, tuple[str, Words, type[Exception], str]] = {
    "phm": ("bert-double", said("phm_layer", True), UnknownMethod, "phm_layer"),
    "a gate": ("bert-double", said("use_gating", True), UnknownMethod, "use_gating"),
    "an invertible adapter": ("bert-double", said("inv_adapter", "nice"), UnknownMethod, "inv_adapter"),
    "an unknown option": ("bert-double", said("sparkle", 3), UnknownMethod, "sparkle"),
    "ia3": ("bert-lora", said("composition_mode", "scale"), UnknownMethod, "composition_mode"),
    "dora": ("bert-lora", said("use_dora", True), UnknownMethod, "use_dora"),
    "another architecture": ("bert-lora", said("architecture", "reft"), UnknownMethod, "reft"),
    "a prompt": ("bert-lora", said("architecture", "prompt_tuning"), UnknownMethod, "prompt"),
    "a union": ("bert-lora", said("architecture", "union"), UnknownMethod, "union"),
    "a place without tensors": ("bert-single", said("mh_adapter", True), MismatchedTensors, "mh_adapter"),
    "tensors without a place": ("bert-double", said("mh_adapter", False), MismatchedTensors, "mh_adapter"),
    "a layer that is there": ("bert-double", said("leave_out", [1]), MismatchedTensors, "leave_out"),
    "layers as a word": ("bert-double", said("leave_out", "all"), AdapterError, "leave_out"),
    "a non-linearity": ("bert-double", said("non_linearity", "wavelet"), AdapterError, "non-linearity"),
    "a wrong type": ("bert-double", said("ln_before", "yes"), AdapterError, "ln_before"),
    "another size": ("bert-double", said("reduction_factor", 2), MismatchedTensors, "shape"),
    "no size for a layer": ("bert-sizes", said("reduction_factor", {"1": 2}), AdapterError, "default"),
    "another rank": ("gpt2-lora", said("r", 3), MismatchedTensors, "announces rank"),
    "matrices as a word": ("bert-lora", said("attn_matrices", "qv"), AdapterError, "attn_matrices"),
    "no name": ("bert-double", lambda raw: raw.pop("name"), AdapterError, "name"),
    "no words": ("bert-double", lambda raw: raw.update(config="pfeiffer"), AdapterError, "config"),
    "another name": ("bert-double", lambda raw: raw.update(name="two"), MismatchedTensors, "two"),
}


@pytest.mark.parametrize("fault", WORDS)
def test_words_that_are_not_understood(fault: str, tmp_path: Path) -> None:
    case, change, error, message = WORDS[fault]
    with pytest.raises(error, match=message):
        ps.load_adapter(copied(case, tmp_path, words=change))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UntrustedPickle, match="--allow-pickle"):
        ps.load_adapter(THEIRS / "bert-prefix")
    path = copied("bert-double", tmp_path)
    (path / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="no JSON"):
        ps.load_adapter(path)
    shutil.rmtree(path)
    path = copied("bert-double", tmp_path)
    file = path / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(TruncatedShard):
        ps.load_adapter(path)
    file.unlink()
    with pytest.raises(AdapterError, match=r"no adapter\.safetensors"):
        ps.load_adapter(path)


def test_a_pickle_of_more_than_tensors(tmp_path: Path) -> None:
    path = Path(shutil.copytree(THEIRS / "bert-prefix", tmp_path / "adapter"))
    torch.save({"x": Path("y")}, path / "pytorch_adapter.bin")
    with pytest.raises(UntrustedPickle, match="tensors alone"):
        ps.load_adapter(path, allow_pickle=True)


def pickled(case: str, to: Path, change: Tensors) -> Path:
    path = Path(shutil.copytree(THEIRS / case, to / "adapter"))
    held = torch.load(path / "pytorch_adapter.bin", weights_only=True)
    change(held)
    torch.save(held, path / "pytorch_adapter.bin")
    return path


def test_second_names_have_to_agree(tmp_path: Path) -> None:
    path = pickled(
        "bert-normed", tmp_path, lambda t: t.update({key(t, "adapter_down.0.bias"): torch.zeros(16)})
    )
    with pytest.raises(MismatchedTensors, match="twice"):
        ps.load_adapter(path, allow_pickle=True)


GROUP = "bert.prefix_tuning.prefix_tunings.one"
PREFIXES: dict[str, tuple[Tensors, type[Exception], str]] = {
    "other copies": (instead("control_trans", torch.zeros(192)), MismatchedTensors, "copies"),
    "uneven": (lambda held: held.update({k: torch.ones(191) for k in held}), MismatchedTensors, "evenly"),
    "another group": (with_(f"{GROUP}.cross_prefix.x"), UnknownMethod, "cross_prefix"),
    "an encoder too": (with_(f"{GROUP}.self_prefix.wte.weight"), MismatchedTensors, "wte"),
    "something else": (with_("bert.x"), MismatchedTensors, r"bert\.x"),
}


@pytest.mark.parametrize("fault", PREFIXES)
def test_prefixes_that_do_not_fit(fault: str, tmp_path: Path) -> None:
    change, error, message = PREFIXES[fault]
    with pytest.raises(error, match=message):
        ps.load_adapter(pickled("bert-prefix", tmp_path, change), allow_pickle=True)


def test_a_prefix_by_another_formula(tmp_path: Path) -> None:
    path = Path(shutil.copytree(THEIRS / "bert-prefix-projected", tmp_path / "adapter"))
    change_json(path / "adapter_config.json", said("non_linearity", "relu"))
    with pytest.raises(UnknownMethod, match="eject_prefix_tuning"):
        ps.load_adapter(path, allow_pickle=True)


def test_the_fault_of_an_early_library_is_kept(tmp_path: Path) -> None:
    """Before 1.1.0 a LoRA was trained with a scale of 1, whatever alpha said; later libraries load it so."""
    path = copied("bert-lora", tmp_path, words=lambda raw: raw.update(version="adapters.1.0.1"))
    assert [step.method.scaling for step in ps.load_adapter(path).plan.steps] == [1.0] * 4


def test_files_without_a_version_spell_gelu_otherwise(tmp_path: Path) -> None:
    path = copied("bert-single", tmp_path, words=lambda raw: raw.pop("version"))
    assert ps.load_adapter(path).plan.steps[0].method.non_linearity == "gelu_new"


def test_a_fusion_without_its_members(tmp_path: Path) -> None:
    path = Path(shutil.copytree(THEIRS / "bert-fusion", tmp_path / "setup"))
    alone = Path(shutil.move(path / "a,b", tmp_path / "alone" / "a,b"))
    with pytest.raises(AdapterError, match="fuses 'a'"):
        ps.load_adapter(alone)
    with pytest.raises(AdapterError, match="holds no"):
        ps.load_adapter(path)
    shutil.copytree(path / "a", alone.parent / "a")
    shutil.copytree(path / "b", alone.parent / "b")
    assert ps.load_adapter(alone) == ps.load_adapter(THEIRS / "bert-fusion")


def test_a_fusion_at_other_places_than_its_members(tmp_path: Path) -> None:
    path = Path(shutil.copytree(THEIRS / "bert-fusion", tmp_path / "setup"))
    file = path / "a,b" / "model_adapter_fusion.safetensors"
    save_file({k: t for k, t in load_file(file).items() if ".layer.1." not in k}, file)
    with pytest.raises(MismatchedTensors, match="same places"):
        ps.load_adapter(path)


@pytest.mark.parametrize("kind", ["Stack", "Parallel", "BatchSplit"])
def test_another_composition(kind: str, tmp_path: Path) -> None:
    path = Path(shutil.copytree(THEIRS / "bert-fusion", tmp_path / "setup"))
    change_json(path / "adapter_setup.json", lambda raw: raw["adapter_setup"].update(type=kind))
    with pytest.raises(AdapterError, match="one by one"):
        ps.load_adapter(path)


def test_a_set_up_of_one(tmp_path: Path) -> None:
    shutil.copytree(THEIRS / "bert-single", tmp_path / "setup" / "one")
    child = {"type": "single", "children": ["one"]}
    told = {"adapter_setup": {"type": "Stack", "children": [child]}, "head_setup": None}
    (tmp_path / "setup" / "adapter_setup.json").write_text(json.dumps(told))
    assert ps.load_adapter(tmp_path / "setup") == ps.load_adapter(THEIRS / "bert-single")


@pytest.mark.parametrize(
    ("case", "option", "value"),
    [
        ("head-bert-deep", "activation_function", "gelu"),
        ("head-bert-pooled", "use_pooler", False),
        ("head-roberta", "layers", 1),
        ("head-gpt2", "bias", True),
        ("head-distilbert", "activation_function", "tanh"),
        ("head-bert-pooled", "head_type", "multiple_choice"),
    ],
)
def test_heads_that_no_class_has(case: str, option: str, value: object, tmp_path: Path) -> None:
    path = copied(case, tmp_path)
    change_json(path / "head_config.json", said(option, value))
    with pytest.raises(AdapterError, match=r"Take head_config\.json away"):
        ps.load_adapter(path)
    (path / "head_config.json").unlink()
    assert not ps.load_adapter(path).replaced


def test_heads_whose_tensors_do_not_fit(tmp_path: Path) -> None:
    path = copied("head-bert-pooled", tmp_path)
    file = path / "model_head.safetensors"
    held = load_file(file)
    save_file({**held, "heads.onemore.1.weight": torch.ones(2, 2)}, file)
    assert ps.load_adapter(path).replaced.keys() == {"classifier.weight", "classifier.bias"}
    save_file({"heads.one.1.weight": held["heads.one.1.weight"]}, file)
    with pytest.raises(MismatchedTensors, match=r"heads\.one\.1\.bias"):
        ps.load_adapter(path)


def written(adapter: ps.Adapter, to: Path) -> None:
    ps.save_adapter(adapter, to / "out", format="adapterhub")


def test_what_the_format_cannot_say(tmp_path: Path) -> None:
    bert, bart = CASES["bert-pfeiffer"].model, CASES["bart-houlsby"].model
    faults: list[tuple[ps.Adapter, str]] = [
        (single(ps.LoRA(r=2), "attention.output.dense")(bert()), "query, key and value"),
        (single(ps.LoRA(r=2, lora_bias=True), "query")(bert()), "no bias of its own"),
        (single(ps.LoRA(r=2), "query,value", rank_pattern={"query": 3})(bert()), "one rank"),
        (single(ps.LoRA(r=2), "query", bias="lora_only")(bert()), "no biases"),
        (single(ps.LoRA(r=2), "query", modules_to_save=["output.LayerNorm"])(bert()), "no head"),
        (single(HOULSBY, "layer.0.output,attention.output")(bert()), "same places in every layer"),
        (single(HOULSBY, "re:encoder.*output_adapters")(bart()), "decoder's layers"),
        (single(HOULSBY, "output_adapter", layers_to_transform=1)(bart()), "decoder's layers"),
        (single(HOULSBY, "mh_adapter")(CASES["albert-pfeiffer"].model()), "ALBERT"),
        (single(ps.PromptTuning(3))(bert()), "positions and norm"),
        (replace(CASES["bert-head"].adapter, model_type=None), "--base MODEL"),
    ]
    for adapter, message in faults:
        with pytest.raises(SurgeryError, match=message):
            written(adapter, tmp_path)
        assert list(tmp_path.iterdir()) == []


def test_trailing_layers_that_are_left_out_stay_so(tmp_path: Path) -> None:
    """AdapterHub would fill them with random bottlenecks: the file names layers beyond those it knows of."""
    adapter = single(HOULSBY, "output_adapter", layers_to_transform=0)(CASES["bert-houlsby"].model())
    written(adapter, tmp_path)
    left_out = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["config"]["leave_out"]
    assert left_out[0] == 1 and len(left_out) > 100
    loaded = dict(ps.load_adapter(tmp_path / "out").tensors())
    assert all(torch.equal(value, loaded[f"bert.{name}"]) for name, value in adapter.tensors())


@pytest.mark.parametrize("width, size", [(width, size) for width in (12, 384, 768) for size in range(1, 13)])
def test_every_size_has_a_factor(width: int, size: int) -> None:
    from peftsurgery.disk.adapterhub_bottleneck import _reduction

    site = ps.Site("encoder.layer.0.output", ps.Kind.OUTPUT, (width,))
    factor = _reduction(ps.Step(site, ps.Bottleneck(bottleneck_size=size)))
    assert int(width // factor) == size
