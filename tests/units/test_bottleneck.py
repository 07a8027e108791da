"""The formulas of bottlenecks and their fusion, written out once more by hand; and what is refused."""

from __future__ import annotations

from math import sqrt
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftsurgery as ps
from peftsurgery.adapter import check
from peftsurgery.errors import AdapterError, MismatchedTensors, NotFoldable, PlanError
from peftsurgery.methods import AdapterFusion, Bottleneck

D = 8
SITE = ps.Site("encoder.layer.0.output", ps.Kind.OUTPUT, (D,))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained(method: Any, seed: int = 0) -> dict[str, Tensor]:
    return {n: noise(*s, seed=seed + i) / 2 for i, (n, s) in enumerate(method.shapes(SITE).items())}


Y, R, NORM = noise(2, 3, D, seed=90), noise(2, 3, D, seed=91), nn.LayerNorm(D)
with torch.no_grad():
    NORM.weight.copy_(noise(D, seed=92))
    NORM.bias.copy_(noise(D, seed=93))


def up(x: Tensor, p: dict[str, Tensor], act: Any = torch.relu) -> Tensor:
    return (
        act(x @ p["adapter_down.0.weight"].T + p["adapter_down.0.bias"]) @ p["adapter_up.weight"].T
        + p["adapter_up.bias"]
    )


def close(a: Tensor, b: Tensor) -> None:
    assert torch.allclose(a, b, atol=1e-6), (a - b).abs().max()


def test_houlsby() -> None:
    method = Bottleneck(reduction_factor=2, non_linearity="swish")
    p = trained(method)
    close(method.forward(Y, R, NORM, p, False), up(Y, p, nn.functional.silu) + Y)


def test_pfeiffer() -> None:
    method = Bottleneck(bottleneck_size=3, original_ln_before=True, scaling=0.5)
    p = trained(method)
    close(method.forward(Y, R, NORM, p, False), 0.5 * up(NORM(Y + R), p) + Y)
    close(method.forward(Y, R, None, p, False), 0.5 * up(Y + R, p) + Y)


def test_parallel() -> None:
    method = Bottleneck(reduction_factor=2, is_parallel=True, scaling=4.0)
    p = trained(method)
    close(method.forward(Y, R, NORM, p, False), 4 * up(R, p) + Y)


@pytest.mark.parametrize(
    ("around", "expected"), [(True, lambda: Y), (False, lambda: NORM(Y + R)), ("post_add", lambda: Y + R)]
)
def test_what_goes_around(around: Any, expected: Any) -> None:
    method = Bottleneck(original_ln_before=True, residual_before_ln=around)
    p = trained(method)
    close(method.forward(Y, R, NORM, p, False), up(NORM(Y + R), p) + expected())


@pytest.mark.parametrize("word", ["learned", "channel"])
def test_learned_scales(word: str) -> None:
    method = Bottleneck(scaling=word)
    p = trained(method)
    assert p["scaling"].shape == ((1,) if word == "learned" else (D,))
    assert torch.equal(method.init(SITE, None)["scaling"], torch.ones_like(p["scaling"]))
    close(method.forward(Y, R, NORM, p, False), p["scaling"] * up(Y, p) + Y)


@pytest.mark.parametrize("before", [False, True])
def test_norms_of_its_own(before: bool) -> None:
    method = Bottleneck(ln_before=True, ln_after=True, adapter_residual_before_ln=before)
    p = trained(method)
    assert method.twins == {
        f"adapter_down.0.{leaf}": f"adapter_norm_before.{leaf}" for leaf in ("weight", "bias")
    }

    def norm(x: Tensor, name: str) -> Tensor:
        scaled = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return scaled * p[f"{name}.weight"] + p[f"{name}.bias"]

    plain = {name.replace("down.1", "down.0"): value for name, value in p.items()}
    out = up(norm(Y, "adapter_norm_before"), plain)
    expected = norm(out + Y, "adapter_norm_after") if before else norm(out, "adapter_norm_after") + Y
    close(method.forward(Y, R, NORM, p, False), expected)


WORDS = {
    **{"relu": nn.ReLU(), "gelu": nn.GELU(), "gelu_new": nn.GELU("tanh"), "tanh": nn.Tanh()},
    **{"swish": nn.SiLU(), "silu": nn.SiLU(), "sigmoid": nn.Sigmoid()},
    **{"leakyrelu": nn.LeakyReLU(), "leaky_relu": nn.LeakyReLU()},
}


@pytest.mark.parametrize(("word", "module"), WORDS.items(), ids=list(WORDS))
def test_non_linearities(word: str, module: nn.Module) -> None:
    method = Bottleneck(non_linearity=word)
    p = trained(method)
    close(method.forward(Y, R, NORM, p, False), up(Y, p, module) + Y)


def test_sizes_are_adapterhubs() -> None:
    assert Bottleneck().size(384) == 24
    assert Bottleneck(reduction_factor=7).size(384) == 54
    assert Bottleneck(reduction_factor=0.5).size(8) == 16
    assert Bottleneck(reduction_factor=1000).size(8) == 1
    assert Bottleneck(reduction_factor=1000, bottleneck_size=5).size(8) == 5


def test_starts() -> None:
    wide = ps.Site("output", ps.Kind.OUTPUT, (512,))
    for word, deviation, limit in (("bert", 0.02, 1.0), ("houlsby", 0.0088, 0.02)):
        p = Bottleneck(init_weights=word, reduction_factor=2).init(
            wide, None, torch.Generator().manual_seed(0)
        )
        for name in ("adapter_down.0.weight", "adapter_up.weight"):
            assert abs(float(p[name].std()) - deviation) < 2e-4
            assert float(p[name].abs().max()) <= limit
        assert not p["adapter_down.0.bias"].any() and not p["adapter_up.bias"].any()
    still = Bottleneck(init_weights="mam_adapter", reduction_factor=2).init(wide, None)
    assert not still["adapter_up.weight"].any()
    assert abs(float(still["adapter_down.0.weight"].abs().max()) - 1 / sqrt(512)) < 1e-4


def test_dropout_is_of_training_only() -> None:
    method = Bottleneck(dropout=0.5)
    p = trained(method)
    assert torch.equal(method.forward(Y, R, NORM, p, False), method.forward(Y, R, NORM, p, False))
    torch.manual_seed(0)
    dropped = method.forward(Y, R, NORM, p, True) - Y
    assert 0.2 < float((dropped == 0).float().mean()) < 0.8


MEMBERS = (
    ("a", Bottleneck(original_ln_before=True, bottleneck_size=2)),
    ("b", Bottleneck(original_ln_before=True, bottleneck_size=3, non_linearity="gelu", scaling=2.0)),
)


def attended(fusion: AdapterFusion, p: dict[str, Tensor], query: Tensor, said: list[Tensor]) -> Tensor:
    """Σ wᵢ V uᵢ, token by token and member by member."""
    q = query @ p["query.weight"].T + p["query.bias"]
    scores = [(q * (u @ p["key.weight"].T + p["key.bias"])).sum(-1) / fusion.temperature for u in said]
    exponents = [torch.exp(score - torch.stack(scores).max(0).values) for score in scores]
    values = [u @ p["value.weight"].T if fusion.value else u for u in said]
    return sum(e[..., None] / sum(exponents)[..., None] * v for e, v in zip(exponents, values, strict=True))


def spoken(p: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    a, b = ({n.removeprefix(f"{m}."): v for n, v in p.items() if n.startswith(f"{m}.")} for m in "ab")
    return [up(x, a), 2 * up(x, b, nn.functional.gelu)]


@pytest.mark.parametrize(
    "words",
    [{}, {"value": False}, {"query_before_ln": True}, {"temperature": 3.0}, {"value_before_softmax": False}],
    ids=str,
)
def test_fusion(words: dict[str, Any]) -> None:
    method = AdapterFusion(MEMBERS, **words)
    p = trained(method)
    x = NORM(Y + R)
    query = Y if method.query_before_ln else x
    close(method.forward(Y, R, NORM, p, False), attended(method, p, query, spoken(p, x)) + Y)


def test_fusion_with_what_goes_around_in_front() -> None:
    method = AdapterFusion(MEMBERS, residual_before=True)
    p = trained(method)
    said = [u + Y for u in spoken(p, NORM(Y + R))]
    close(method.forward(Y, R, NORM, p, False), attended(method, p, NORM(Y + R), said))


def test_fusion_beside_the_sublayer() -> None:
    method = AdapterFusion(tuple((n, ps.Bottleneck(is_parallel=True, bottleneck_size=2)) for n in "ab"))
    p = trained(method)
    a, b = ({n.removeprefix(f"{m}."): v for n, v in p.items() if n.startswith(f"{m}.")} for m in "ab")
    expected = attended(method, p, R, [up(R, a), up(R, b)]) + R + Y
    close(method.forward(Y, R, NORM, p, False), expected)


def test_fusion_weights_are_a_distribution() -> None:
    method = AdapterFusion(MEMBERS)
    weights = method.weights(Y, R, NORM, trained(method))
    assert weights.shape == (2, 3, 2)
    close(weights.sum(-1), torch.ones(2, 3))


def test_fusion_starts_as_adapterhubs() -> None:
    p = AdapterFusion(MEMBERS).init(SITE, None, torch.Generator().manual_seed(0))
    expected = torch.full((D, D), 1e-6).fill_diagonal_(1.0)
    assert torch.equal(p["value.weight"], expected)
    assert 0.01 < float(p["query.weight"].std()) < 0.03 and not p["query.bias"].any()
    assert "value.bias" not in p
    free = AdapterFusion(MEMBERS, value_initialized=False).init(SITE, None)
    assert float(free["value.weight"].abs().max()) < 0.2


def test_the_penalty_pulls_to_the_identity() -> None:
    method = AdapterFusion(MEMBERS)
    p = trained(method)
    expected = 0.01 * ((torch.eye(D) - p["value.weight"]) ** 2).sum()
    penalty = method.penalty(p)
    assert penalty is not None
    close(penalty, expected)
    assert AdapterFusion(MEMBERS, regularization=False).penalty(p) is None
    assert Bottleneck().penalty({}) is None


def test_stages() -> None:
    method = AdapterFusion(MEMBERS)
    second = {name for name in method.shapes(SITE) if method.stage(name) == 2}
    assert second == {"query.weight", "query.bias", "key.weight", "key.bias", "value.weight"}
    assert (method.trains_in, Bottleneck().trains_in, Bottleneck().stage("scaling")) == (2, 1, 1)


def test_the_last_member_says_how_the_layer_goes_on() -> None:
    final = Bottleneck(original_ln_after=False)
    assert final.is_final and not Bottleneck().is_final
    assert AdapterFusion((("a", Bottleneck()), ("b", final))).is_final
    assert not AdapterFusion((("a", final), ("b", Bottleneck()))).is_final


def test_scaling() -> None:
    method = Bottleneck(original_ln_before=True, scaling=2.0)
    p = trained(method)
    full, half = method.forward(Y, R, NORM, p, False), method.scaled(0.5).forward(Y, R, NORM, p, False)
    close(half - Y, (full - Y) / 2)
    for stiff in (
        Bottleneck(scaling="learned"),
        Bottleneck(ln_after=True),
        Bottleneck(original_ln_before=True, residual_before_ln=False),
        AdapterFusion(MEMBERS),
    ):
        with pytest.raises(NotFoldable, match="Export"):
            stiff.scaled(0.5)


@pytest.mark.parametrize(
    "words",
    [
        {"reduction_factor": 0},
        {"reduction_factor": "16"},
        {"bottleneck_size": 0},
        {"non_linearity": "reluu"},
        {"scaling": "channels"},
        {"scaling": float("nan")},
        {"dropout": 1.0},
        {"init_weights": "lora"},
        {"residual_before_ln": "before"},
        {"residual_before_ln": "post_add"},
    ],
    ids=str,
)
def test_refused_bottlenecks(words: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=r"Try|is one of|Nearest|is True|Set that"):
        Bottleneck(**words)


@pytest.mark.parametrize(
    "words",
    [
        {"members": (("query", Bottleneck()),)},
        {"members": (("a.b", Bottleneck()),)},
        {"members": (("a", Bottleneck()), ("a", Bottleneck()))},
        {"members": MEMBERS, "query": False, "key": False},
        {"members": MEMBERS, "temperature": 0},
        {"members": MEMBERS, "dropout_prob": 1.0},
    ],
    ids=str,
)
def test_refused_fusions(words: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        AdapterFusion(**words)


def test_a_fusion_of_nothing_is_put_nowhere() -> None:
    reason = AdapterFusion().check(SITE)
    assert reason is not None and "adapters=" in reason
    assert AdapterFusion(MEMBERS).check(SITE) is None


def test_an_output_has_no_weight_to_fold(tmp_path: Any) -> None:
    method = Bottleneck()
    plan = ps.Plan((ps.Step(SITE, method),))
    adapter = check(ps.Adapter(plan, {SITE.name: method.init(SITE, None)}))
    assert str(SITE) == "encoder.layer.0.output (output 8 wide)"
    with pytest.raises(NotFoldable, match="export-onnx"):
        list(ps.folded([], adapter))
    assert ps.bake(adapter) is adapter
    with pytest.raises(AdapterError, match="adapterhub"):
        ps.save_adapter(adapter, tmp_path / "out", format="peft")
    with pytest.raises(MismatchedTensors):
        check(ps.Adapter(plan, {SITE.name: {}}))


def test_an_output_is_found_with_and_without_a_prefix() -> None:
    from peftsurgery.adapter import rebased

    method = Bottleneck()
    adapter = ps.Adapter(ps.Plan((ps.Step(SITE, method),)), {SITE.name: method.init(SITE, None)})
    there = ps.Site(f"bert.{SITE.name}", ps.Kind.OUTPUT, (D,))
    assert rebased(adapter, [there])[0].plan.sites == (there,)
