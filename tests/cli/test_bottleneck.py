"""`inject --method bottleneck` and `--method fusion`: the named configurations, and fusing trained adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result

import peftsurgery as ps
from peftsurgery.errors import PlanError, UnclaimedSites
from tests.laws.test_live_laws import assert_same, snapshot
from tests.output_subjects import FEATURES, FUSION, HOULSBY, PFEIFFER, SUBJECTS, trained

Run = Callable[..., Result]
BERT = SUBJECTS[0]
PLACES = {
    "pfeiffer": ["output"],
    "seq_bn": ["output"],
    "houlsby": ["attention.output", "output"],
    "double_seq_bn": ["attention.output", "output"],
    "parallel": ["output"],
    "par_bn": ["output"],
    "scaled-parallel": ["output"],
    "scaled_par_bn": ["output"],
}


def test_every_configuration_is_here() -> None:
    assert list(PLACES) == list(ps.CONFIGS)


@pytest.mark.parametrize("config", PLACES)
def test_a_configuration_says_method_and_places(run: Run, bert: Path, config: str) -> None:
    words = ("--method", "bottleneck", "--config", config, "--set", "reduction_factor=8", "--dry-run")
    said = run("inject", bert, *words, "--json")
    assert said.exit_code == 0, said.output
    report = json.loads(said.stdout)
    assert report["sites"] == [f"encoder.layer.{i}.{place}" for i in range(2) for place in PLACES[config]]
    shown = run("inject", bert, *words)
    assert "reduction_factor=8" in shown.output and "32 wide" in shown.output


def test_places_can_be_said(run: Run, bert: Path) -> None:
    words = ("--method", "bottleneck", "--config", "pfeiffer", "--dry-run", "--json")
    said = run("inject", bert, *words, "--targets", "mh_adapter", "--layers-to-transform", "1")
    assert json.loads(said.stdout)["sites"] == ["encoder.layer.1.attention.output"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "pfeiffer"], "--method bottleneck"),
        (["--method", "bottleneck", "--config", "pfeifer"], "no configuration"),
        (["--method", "bottleneck"], "output_adapter"),
        (["--method", "fusion"], "No target"),
        (["--method", "fusion", "--targets", "output_adapter"], "adapters="),
        (["--method", "bottleneck", "--config", "pfeiffer", "--set", "phm_layer=true"], "no hyper-parameter"),
        (["--method", "lora", "--targets", "query", "--adapters", "a,b"], "fuses no adapters"),
    ],
)
def test_what_makes_no_sense_is_refused(run: Run, bert: Path, words: list[str], message: str) -> None:
    said = run("inject", bert, *words, "--dry-run")
    assert said.exit_code == 1
    assert message in said.output


def test_trained_adapters_are_fused() -> None:
    a, b = trained(BERT, PFEIFFER, "a"), trained(BERT, dict(FUSION.members)["b"], "b", seed=3)
    model = BERT.model()
    before = snapshot(model)
    ps.inject(model, ps.AdapterFusion(), adapters=[a, b], name="both", task="seq-cls", seed=0)
    trains = ps.trainable_parameters(model)
    assert {"classifier.both.weight", "classifier.both.bias"} <= trains.keys()
    assert all("classifier" in n or n.split(".")[-2] in ("query", "key", "value") for n in trains)
    fused = ps.remove(model, "both")
    assert_same(before, model)
    assert fused.plan.steps[0].method == FUSION
    for site, params in a.params.items():
        for name, value in params.items():
            assert torch.equal(fused.params[site][f"a.{name}"], value)
    started = ps.inject(BERT.model(), fused)
    assert not torch.equal(BERT.run(started), BERT.run(BERT.model()))


def test_a_fusion_of_one_adapter_starts_as_that_adapter() -> None:
    a = trained(BERT, PFEIFFER, "a")
    fused = ps.inject(BERT.model(), ps.AdapterFusion(), adapters=a, task=FEATURES)
    alone = ps.inject(BERT.model(), a)
    assert (BERT.run(fused) - BERT.run(alone)).abs().max() < 1e-4


def test_adapters_that_cannot_be_fused() -> None:
    model, a = BERT.model(), trained(BERT, PFEIFFER, "a")
    before = snapshot(model)
    lora = ps.remove(ps.inject(BERT.model(), ps.LoRA(r=2), "query", task=FEATURES))
    one = ps.inject(BERT.model(), HOULSBY, "output_adapter", name="one", task=FEATURES)
    llama = next(s for s in SUBJECTS if s.name == "llama-gqa")
    fusion = ps.AdapterFusion()
    with pytest.raises(PlanError, match="no bottleneck"):
        ps.inject(model, fusion, adapters=[a, lora])
    with pytest.raises(PlanError, match="same places"):
        ps.inject(model, fusion, adapters=[a, ps.remove(one)])
    with pytest.raises(PlanError, match=r"Two of the adapters are named 'a'.*--name"):
        ps.inject(model, fusion, adapters=[a, a])
    with pytest.raises(PlanError, match="leave out targets"):
        ps.inject(model, fusion, "output_adapter", adapters=[a])
    with pytest.raises(UnclaimedSites):
        ps.inject(model, fusion, adapters=[trained(llama, PFEIFFER, "b")])
    assert_same(before, model)
