"""Writing PEFT's adapter directory: what is said in it, how, and what cannot be said."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from peftsurgery.adapter import Adapter, scale
from peftsurgery.disk import peft as files
from peftsurgery.errors import AdapterError, MismatchedTensors, NonFiniteWeight
from peftsurgery.methods import METHODS, LoRA
from peftsurgery.planning import Plan, Step
from peftsurgery.select import Query
from peftsurgery.site import Kind, Layout, Site

NAMES = [f"model.layers.{layer}.{word}" for layer in (0, 1, 2, 10) for word in ("q", "v")]


def adapter_at(
    *sites: Site | str, method: LoRA | None = None, query: Query | None = None, **rest: Any
) -> Adapter:
    method = method or LoRA(r=2, lora_alpha=4)
    placed = [site if isinstance(site, Site) else Site(site, Kind.LINEAR, (6, 4)) for site in sites]
    steps = tuple(Step(site, method) for site in placed)
    params = {
        site.name: {k: torch.randn(shape) for k, shape in method.shapes(site).items()} for site in placed
    }
    return Adapter(Plan(steps, query), params, **rest)


def configuration(adapter: Adapter, directory: Path) -> dict[str, Any]:
    """What is written for the adapter, after making sure that it reads back as the same."""
    files.write(adapter, directory)
    again = files.read(directory, METHODS, name=adapter.name)
    assert again == adapter
    assert (again.base, again.plan.bias) == (adapter.base, adapter.plan.bias)
    found: dict[str, Any] = json.loads((directory / files.CONFIG).read_text())
    return found


def test_the_least_that_peft_needs_and_every_field_is_there(tmp_path: Path) -> None:
    method = LoRA(r=3, lora_alpha=6.0, lora_dropout=0.25, use_rslora=True)
    adapter = adapter_at("a.q", "a.v", method=method, task_type="SEQ_CLS", base="org/model")
    assert configuration(adapter, tmp_path) == {
        "alpha_pattern": {},
        "base_model_name_or_path": "org/model",
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": 6,
        "lora_bias": False,
        "lora_dropout": 0.25,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 3,
        "rank_pattern": {},
        "target_modules": ["a.q", "a.v"],
        "task_type": "SEQ_CLS",
        "use_rslora": True,
    }


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (Query.of("q,v"), {"target_modules": ["q", "v"]}),
        (Query.of(r"re:.*\.(q|v)"), {"target_modules": r".*\.(q|v)"}),
        (Query.of("q,v", "layers.7.q"), {"target_modules": ["q", "v"], "exclude_modules": ["layers.7.q"]}),
        (Query.of("q,v", r"re:.*\.7\..*"), {"target_modules": ["q", "v"], "exclude_modules": r".*\.7\..*"}),
        (
            Query.of("q,v", layers_to_transform="0-2,10", layers_pattern="layers"),
            {
                "target_modules": ["q", "v"],
                "layers_to_transform": [0, 1, 2, 10],
                "layers_pattern": ["layers"],
            },
        ),
        (None, {"target_modules": NAMES}),
        (Query.of("all-linear"), {"target_modules": NAMES}),
        (Query.of("layers.*.[qv]"), {"target_modules": NAMES}),
        (Query.of("q,v", "layers.7*"), {"target_modules": NAMES, "exclude_modules": None}),
        (Query.of(re.compile(r".*\.(q|v)")), {"target_modules": NAMES}),
        (Query.of([r"re:.*\.q", r"re:.*\.v"]), {"target_modules": NAMES}),
        (
            Query.of(r"re:.*", layers_to_transform="0-10"),
            {"target_modules": NAMES, "layers_to_transform": None},
        ),
        (Query.of("q"), {"target_modules": NAMES}),
        (Query.of(r"re:transformer\..*"), {"target_modules": NAMES}),
    ],
)
def test_the_users_words_are_kept_where_peft_has_them(
    tmp_path: Path, query: Query | None, expected: dict[str, Any]
) -> None:
    said = configuration(adapter_at(*NAMES, query=query), tmp_path)
    assert {key: said[key] for key in expected} == expected


def varied(**by_name: LoRA) -> Adapter:
    adapters = [adapter_at(name.replace("_", "."), method=method) for name, method in by_name.items()]
    return Adapter(
        Plan(tuple(adapter.plan.steps[0] for adapter in adapters)),
        {site: params for adapter in adapters for site, params in adapter.params.items()},
    )


def test_what_differs_from_the_commonest_becomes_a_pattern(tmp_path: Path) -> None:
    common = LoRA(r=4, lora_alpha=8)
    said = configuration(
        varied(a_0_q=replace(common, r=2), a_0_v=common, a_1_q=replace(common, lora_alpha=3.5), a_1_v=common),
        tmp_path,
    )
    assert (said["r"], said["lora_alpha"]) == (4, 8)
    assert said["rank_pattern"] == {"a.0.q": 2}
    assert said["alpha_pattern"] == {"a.1.q": 3.5}


def test_a_pattern_for_a_name_that_ends_another_is_anchored(tmp_path: Path) -> None:
    common = LoRA(r=4)
    said = configuration(varied(q=replace(common, r=2), b_q=common, c_q=common), tmp_path)
    assert said["rank_pattern"] == {"^q": 2}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.sampled_from([1, 2.5, 8])), min_size=1, max_size=6))
def test_any_mixture_of_ranks_and_alphas_survives(
    tmp_path_factory: pytest.TempPathFactory, mixture: list[tuple[int, float]]
) -> None:
    methods = {f"m_{i}_q": LoRA(r=r, lora_alpha=alpha) for i, (r, alpha) in enumerate(mixture)}
    configuration(varied(**methods), tmp_path_factory.mktemp("mixture"))


def test_what_the_format_cannot_vary_is_refused(tmp_path: Path) -> None:
    adapter = varied(a_q=LoRA(lora_dropout=0.1), a_v=LoRA())
    with pytest.raises(AdapterError, match=r"'a\.v' has .* only rank and alpha vary"):
        files.write(adapter, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_scaled_adapter_is_saved_scaled(tmp_path: Path) -> None:
    assert configuration(scale(adapter_at("a.q"), 0.7), tmp_path)["lora_alpha"] == pytest.approx(2.8)


@pytest.mark.parametrize(
    "site",
    [
        Site("a.q", Kind.LINEAR, (6, 4)),
        Site("a.q", Kind.LINEAR, (4, 6), Layout.IN_OUT),
        Site("a.q", Kind.LINEAR, (1, 2)),
        Site("emb", Kind.EMBEDDING, (50, 4), Layout.IN_OUT),
        Site("conv", Kind.CONV, (5, 3, 7)),
        Site("conv", Kind.CONV, (5, 3, 3, 2)),
        Site("conv", Kind.CONV, (5, 3, 1, 1, 4)),
    ],
)
@pytest.mark.parametrize("lora_bias", [False, True])
def test_a_site_is_told_from_its_tensors(tmp_path: Path, site: Site, lora_bias: bool) -> None:
    method = LoRA(r=2, lora_bias=lora_bias)
    said = configuration(adapter_at(site, method=method), tmp_path)
    assert said["fan_in_fan_out"] is (site.kind is Kind.LINEAR and site.layout is Layout.IN_OUT)
    assert files.read(tmp_path, METHODS).plan.sites == (site,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_survive(tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = adapter_at("a.q")
    params = {site: {k: t.to(dtype) for k, t in own.items()} for site, own in adapter.params.items()}
    configuration(replace(adapter, params=params, replaced={"head.weight": torch.ones(2, 3)}), tmp_path)
    read = files.read(tmp_path, METHODS).params["a.q"]
    assert {tensor.dtype for tensor in read.values()} == {dtype}


def test_whole_tensors_have_the_keys_that_peft_gives_them(tmp_path: Path) -> None:
    adapter = adapter_at("a.q", "lm_head")
    whole = [
        "a.q.bias",
        "lm_head.weight",
        "embed_tokens.weight",
        "norm.bias",
        "score.out.weight",
        "x.y.weight",
    ]
    plan = replace(adapter.plan, bias="all", modules_to_save=("score",))
    adapter = replace(adapter, plan=plan, replaced={name: torch.randn(3) for name in whole})
    said = configuration(adapter, tmp_path)
    assert said["modules_to_save"] == ["score", "x.y"]
    with safe_open(tmp_path / files.TENSORS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert {key for key in file.keys() if "lora" not in key} == {  # noqa: SIM118
            "base_model.model.a.q.base_layer.bias",
            "base_model.model.lm_head.base_layer.weight",
            "base_model.model.embed_tokens.weight",
            "base_model.model.norm.bias",
            "base_model.model.score.out.weight",
            "base_model.model.x.y.weight",
        }


def test_sites_are_read_in_natural_order(tmp_path: Path) -> None:
    files.write(adapter_at(*(f"layer.{i}.q" for i in (11, 2, 10, 1))), tmp_path)
    sites = files.read(tmp_path, METHODS).plan.sites
    assert [site.name for site in sites] == [f"layer.{i}.q" for i in (1, 2, 10, 11)]


def test_views_and_shared_memory_are_written_whole(tmp_path: Path) -> None:
    adapter, table = adapter_at("a.q"), torch.randn(8, 4)
    configuration(replace(adapter, replaced={"x.weight": table.t(), "y.weight": table[::2]}), tmp_path)


def test_files_are_as_readable_as_the_user_wants(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.write(adapter_at("a.q"), tmp_path)
    finally:
        os.umask(before)
    modes = {name: (tmp_path / name).stat().st_mode & 0o777 for name in (files.CONFIG, files.TENSORS)}
    assert set(modes.values()) == {0o640}


def test_what_is_not_whole_is_not_written(tmp_path: Path) -> None:
    adapter = adapter_at("a.q")
    own = adapter.params["a.q"]
    nan = {**own, "lora_B.weight": own["lora_B.weight"] * torch.nan}
    spoilt = [
        (replace(adapter, params={"a.q": {"lora_A.weight": own["lora_A.weight"]}}), MismatchedTensors),
        (replace(adapter, params={"a.q": nan}), NonFiniteWeight),
        (replace(adapter, params={"a.q": {k: t.to("meta") for k, t in own.items()}}), AdapterError),
        (replace(adapter, shared={"table": torch.ones(2)}), AdapterError),
        (Adapter(Plan(()), {}), AdapterError),
    ]
    for broken, error in spoilt:
        with pytest.raises(error):
            files.write(broken, tmp_path)
        assert list(tmp_path.iterdir()) == []
