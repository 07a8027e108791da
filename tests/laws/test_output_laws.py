"""The laws of output methods: every form of them on every architecture whose sublayers are known."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch import Tensor

import peftsurgery as ps
from peftsurgery.errors import (
    AlreadyGrafted,
    NoSiteMatched,
    NotFoldable,
    PlanError,
    UnclaimedSites,
    UnsupportedSite,
)
from peftsurgery.live import outputs, surgery
from peftsurgery.live.sublayers import sublayers
from peftsurgery.method import Map, OutputMethod, Params
from tests.laws.conftest import relative
from tests.laws.test_live_laws import assert_same, snapshot
from tests.output_subjects import (
    BOTH,
    FEATURES,
    FEW,
    FUSION,
    HOULSBY,
    METHODS,
    PFEIFFER,
    SUBJECTS,
    OutputSubject,
    trained,
)

every = pytest.mark.parametrize("subject", SUBJECTS, ids=str)
few = pytest.mark.parametrize("subject", FEW, ids=str)
method_of = pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))


@dataclass(frozen=True)
class Echo(OutputMethod):
    """What the layer would have made of the sublayer's output: right only if all three are what they are said to be."""

    name: ClassVar[str] = "echo"
    kinds: ClassVar[frozenset[ps.Kind]] = frozenset({ps.Kind.OUTPUT})
    is_final: ClassVar[bool] = True  # type: ignore[assignment]

    def shapes(self, site: ps.Site) -> dict[str, tuple[int, ...]]:
        return {"none": site.shape}

    def init(self, site: ps.Site, weight: Any, generator: Any = None) -> dict[str, Tensor]:
        return {"none": torch.zeros(site.shape)}

    def forward(self, y: Tensor, residual: Tensor, norm: Map | None, p: Params, training: bool) -> Tensor:
        return y + residual if norm is None else norm(y + residual)


def test_every_method_is_here() -> None:
    known = {name for name, kind in ps.METHODS.items() if issubclass(kind, OutputMethod)}
    assert {method.name for method in METHODS.values()} == known


@every
def test_the_parts_of_a_sublayer_are_what_they_are_said_to_be(subject: OutputSubject) -> None:
    model = subject.model()
    before = subject.run(model)
    ps.inject(model, Echo(), _roles(model), task=FEATURES)
    assert relative(subject.run(model), before) < 2e-5


@dataclass(frozen=True)
class Witness(Echo):
    """Changes nothing, and remembers what a sublayer's input was, and what its sum is, normalised or not."""

    name: ClassVar[str] = "witness"
    is_final: ClassVar[bool] = False  # type: ignore[assignment]
    sums: ClassVar[list[tuple[Tensor, Tensor]]] = []

    def forward(self, y: Tensor, residual: Tensor, norm: Map | None, p: Params, training: bool) -> Tensor:
        self.sums.append((residual, super().forward(y, residual, norm, p, training)))
        return y


@every
def test_a_layer_is_the_sum_of_its_sublayers(subject: OutputSubject) -> None:
    """Every residual is all that stands in front of the output in the sum: the layer is a chain of such sums."""
    model, chain = subject.model(), list[tuple[Tensor, ...]]()
    layers = dict.fromkeys(layer for layer, _ in sublayers(model).values())
    for layer in layers:
        model.get_submodule(layer).register_forward_hook(
            lambda _, args, words, out: chain.append(
                (args[0] if args else words["hidden_states"], first(out))
            ),
            with_kwargs=True,
        )
    subject.run(model)
    found, ends = list(chain), [layer for layer, _ in sublayers(model).values()]
    Witness.sums.clear()
    subject.run(ps.inject(subject.model(), Witness(), _roles(model), task=FEATURES))
    assert len(Witness.sums) * len(layers) == len(found) * len(ends), "no place is missed"
    links = iter(Witness.sums)
    for (start, end), layer in zip(found, [*layers] * (len(found) // len(layers)), strict=True):
        for residual, total in islice(links, ends.count(layer)):
            if subject.name != "bloom-late":  # its residuals are normalised first
                assert_near(residual, start)
            start = total
        assert_near(start, end)


def assert_near(a: Tensor, b: Tensor) -> None:
    assert torch.allclose(a.reshape(b.shape), b, atol=1e-5 * float(b.abs().max()))


def first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _roles(model: torch.nn.Module) -> str:
    return ",".join(sorted({sub.role for _, sub in sublayers(model).values()}))


DROPPING = ("bert", "bart", "opt", "bloom", "phi", "gptj", "gpt-neox", "beit", "swin")


@pytest.mark.parametrize("subject", [s for s in SUBJECTS if s.name in DROPPING], ids=str)
def test_what_a_layer_drops_in_training(subject: OutputSubject) -> None:
    """An adapter that changes nothing leaves the layer dropping what it drops, once."""

    def dropped(model: torch.nn.Module) -> Tensor:
        for module in model.modules():
            words = vars(module).keys() & {"dropout", "hidden_dropout"}
            vars(module).update(dict.fromkeys(words, 0.4))
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.4
        torch.manual_seed(0)
        return subject.run(model.train())

    still = ps.Bottleneck(bottleneck_size=3, init_weights="mam_adapter")
    plain, worn = dropped(subject.model()), dropped(ps.inject(subject.model(), still, BOTH, task=FEATURES))
    assert relative(plain, subject.run(subject.model())) > 1e-2
    assert torch.equal(worn, plain)


@every
@method_of
def test_removal(subject: OutputSubject, method: OutputMethod) -> None:
    model = subject.model()
    next(model.parameters()).requires_grad_(False)
    handle = next(iter(model.children())).register_forward_hook(lambda *_: None)
    before, out = snapshot(model), subject.run(model)
    adapter = trained(subject, method)
    ps.inject(model, adapter)
    assert relative(subject.run(model), out) > 1e-3
    assert ps.remove(model) == adapter
    assert_same(before, model)
    assert torch.equal(subject.run(model), out)
    handle.remove()


@every
def test_identity(subject: OutputSubject) -> None:
    model = subject.model()
    before = subject.run(model)
    still = ps.Bottleneck(bottleneck_size=3, original_ln_before=True, init_weights="mam_adapter")
    ps.inject(model, still, BOTH, task=FEATURES)
    assert torch.equal(subject.run(model), before)


@few
def test_a_start_is_near_the_identity(subject: OutputSubject) -> None:
    model = subject.model()
    before = subject.run(model)
    ps.inject(model, ps.Bottleneck(bottleneck_size=3), BOTH, seed=0, task=FEATURES)
    assert 0 < relative(subject.run(model), before) < 2e-2


@few
@method_of
def test_training_moves_theta_only(subject: OutputSubject, method: OutputMethod) -> None:
    model = ps.inject(subject.model(), trained(subject, method)).train()
    for stage in (1, 2) if method is FUSION else (1,):
        theta = set(ps.trainable_parameters(model, stage))
        assert theta == {name for name, p in model.named_parameters() if p.requires_grad}
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimiser = torch.optim.Adam(ps.trainable_parameters(model).values(), lr=0.01)
        model.zero_grad()
        (subject.output(model).float().pow(2).sum() + ps.regularization(model)).backward()
        optimiser.step()
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved == theta


def test_a_training_in_two_stages() -> None:
    subject = SUBJECTS[0]
    model = ps.inject(subject.model(), trained(subject, FUSION))
    second = set(ps.trainable_parameters(model))
    assert {name.rpartition(".output.")[2].split(".")[0] for name in second} == {"query", "key", "value"}
    first = set(ps.trainable_parameters(model, stage=1))
    assert {name.rpartition(".output.")[2].split(".")[0] for name in first} == {"a", "b"}
    assert set(ps.trainable_parameters(model, stage=2)) == second
    assert float(ps.regularization(model).detach()) > 0
    ps.inject(model, PFEIFFER, "output_adapter", name="frozen", task=FEATURES, trainable=False)
    assert {name.replace(".base.", ".", 1) for name in ps.trainable_parameters(model, stage=1)} == first
    with pytest.raises(PlanError, match="stage is 3"):
        ps.trainable_parameters(model, stage=3)
    assert float(ps.regularization(subject.model())) == 0


@few
@method_of
def test_copies_and_pickles(subject: OutputSubject, method: OutputMethod) -> None:
    model = ps.inject(subject.model(), trained(subject, method))
    before = subject.run(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(subject.run(twin), before)
        assert ps.remove(twin) == ps.remove(copy.deepcopy(model))
    fresh = ps.inject(subject.model(), trained(subject, method, seed=5))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(subject.run(fresh), before)


@pytest.mark.parametrize(
    "subject", [s for s in SUBJECTS if s.name != "albert"], ids=str
)  # refused, with a reason
@pytest.mark.parametrize("method", [HOULSBY, FUSION], ids=["houlsby", "fusion"])
def test_files(subject: OutputSubject, method: OutputMethod, tmp_path: Path) -> None:
    model, adapter = subject.model(), trained(subject, method)
    worn = subject.run(ps.inject(subject.model(), adapter))
    ps.inject(model, ps.load_adapter(ps.save_adapter(adapter, tmp_path / "out", format="adapterhub")))
    assert torch.equal(subject.run(model), worn)


@few
@method_of
def test_composition(subject: OutputSubject, method: OutputMethod) -> None:
    a, b = trained(subject, method, "a", 0), trained(subject, method, "b", 7)
    alone = subject.run(ps.inject(subject.model(), b))
    both = ps.inject(ps.inject(subject.model(), a), b)
    together = subject.run(both)
    assert not torch.equal(together, alone)
    ps.activate(both, "b")
    assert torch.equal(subject.run(both), alone)
    ps.activate(both)
    assert torch.equal(subject.run(both), subject.run(subject.model()))
    ps.activate(both, "a", "b")
    assert torch.equal(subject.run(both), together)
    ps.remove(both, "a")
    assert torch.equal(subject.run(both), alone)


@few
def test_one_after_the_other(subject: OutputSubject) -> None:
    """Two adapters that add up are one of both: the second sees what the first gave."""
    doubled = ps.Bottleneck(bottleneck_size=4, is_parallel=True)
    a, b = trained(subject, doubled, "a", 0), trained(subject, doubled, "b", 7)
    together = subject.run(ps.inject(ps.inject(subject.model(), a), b))
    joined = ps.Bottleneck(bottleneck_size=8, is_parallel=True)
    params = {
        site: {
            "adapter_down.0.weight": torch.cat([p["adapter_down.0.weight"] for p in pair]),
            "adapter_down.0.bias": torch.cat([p["adapter_down.0.bias"] for p in pair]),
            "adapter_up.weight": torch.cat([p["adapter_up.weight"] for p in pair], dim=1),
            "adapter_up.bias": pair[0]["adapter_up.bias"] + pair[1]["adapter_up.bias"],
        }
        for site in a.params
        for pair in [(a.params[site], b.params[site])]
    }
    plan = ps.Plan(tuple(ps.Step(step.site, joined) for step in a.plan.steps))
    assert relative(subject.run(ps.inject(subject.model(), ps.Adapter(plan, params))), together) < 1e-5


@few
@method_of
def test_beside_a_lora(subject: OutputSubject, method: OutputMethod) -> None:
    model = ps.inject(subject.model(), trained(subject, method, "bottle"))
    alone = subject.run(model)
    sites = [site.name for site in surgery.sites(model) if site.kind is ps.Kind.LINEAR]
    ps.inject(model, ps.LoRA(r=2, init_lora_weights="gaussian"), sites[2:4], name="lora", task=FEATURES)
    with torch.no_grad():
        for name, parameter in ps.trainable_parameters(model).items():
            if "lora_B" in name:
                parameter.fill_(0.1)
    assert not torch.equal(subject.run(model), alone)
    ps.remove(model, "lora")
    assert torch.equal(subject.run(model), alone)


@few
@method_of
def test_half_precision(subject: OutputSubject, method: OutputMethod) -> None:
    wide = subject.run(ps.inject(subject.model(), trained(subject, method)))
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in subject.inputs().items()}
    model = ps.inject(subject.model().bfloat16(), trained(subject, method))
    with torch.no_grad():
        assert relative(model(**inputs).logits.float(), wide) < 0.15
    assert {p.dtype for p in ps.trainable_parameters(model).values()} == {torch.float32}


@few
@method_of
def test_torch_export(subject: OutputSubject, method: OutputMethod) -> None:
    model = ps.inject(subject.model(), trained(subject, method))
    uncached = {"use_cache": False} if "input_ids" in subject.inputs() else {}
    inputs = {**subject.inputs(), **uncached}
    exported = torch.export.export(model, (), kwargs=inputs, strict=False)
    with torch.no_grad():
        assert relative(exported.module()(**inputs).logits, subject.run(model)) < 2e-5


@pytest.mark.parametrize(
    "subject", [s for s in FEW if s.name not in ("bloom", "beit")], ids=str
)  # it is slow
def test_compile(subject: OutputSubject) -> None:
    model = ps.inject(subject.model(), trained(subject, PFEIFFER))
    compiled = torch.compile(model, backend="aot_eager")
    try:
        assert relative(subject.run(compiled), subject.run(model)) < 2e-5
    finally:
        torch.compiler.reset()


@few
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(subject: OutputSubject, reentrant: bool) -> None:
    def gradients(checkpointed: bool) -> dict[str, Tensor]:
        model = ps.inject(subject.model(), trained(subject, PFEIFFER)).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            for embedding in (
                m for m in model.modules() if isinstance(m, torch.nn.Embedding | torch.nn.Conv2d)
            ):
                embedding.register_forward_hook(lambda _m, _i, out: out.requires_grad_())
        torch.manual_seed(0)
        subject.output(model).float().pow(2).sum().backward()
        return {name: p.grad for name, p in ps.trainable_parameters(model).items()}

    expected, found = gradients(False), gradients(True)
    for name, gradient in expected.items():
        assert found[name] is not None, name
        assert relative(found[name], gradient) < 1e-3, name


@few
def test_dropout_of_the_layer_is_kept(subject: OutputSubject) -> None:
    """In training an adapter that does nothing drops exactly what the layer does."""
    model, grafted = subject.model().train(), subject.model().train()
    ps.inject(grafted, ps.Bottleneck(init_weights="mam_adapter"), BOTH, task=FEATURES)
    outs = []
    for one in (model, grafted):
        torch.manual_seed(0)
        outs.append(subject.run(one))
    assert torch.equal(*outs)


@few
def test_norms_that_train(subject: OutputSubject) -> None:
    model = subject.model()
    before = snapshot(model)
    norms = [n for n, m in model.named_modules() if "norm" in type(m).__name__.lower() and ".0." in n]
    ps.inject(model, PFEIFFER, BOTH, modules_to_save=norms, task=FEATURES, seed=0)
    theta = ps.trainable_parameters(model)
    assert {name for name in theta if "norm" in name.lower()}
    subject.output(model).float().pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.any() for name, p in theta.items() if "norm" in name.lower())
    assert len(ps.remove(model).replaced) >= len(norms)
    assert_same(before, model)


@few
def test_failure_leaves_the_model(subject: OutputSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapter = subject.model(), trained(subject, PFEIFFER)
    before = snapshot(model)
    real, calls = outputs.OutputGraft, []

    def failing(*args: object) -> object:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(outputs, "OutputGraft", failing)
    with pytest.raises(KeyboardInterrupt):
        ps.inject(model, adapter)
    assert_same(before, model)


@method_of
def test_merging_is_refused(method: OutputMethod) -> None:
    subject = SUBJECTS[0]
    model = subject.model()
    before = snapshot(model)
    with pytest.raises(NotFoldable, match="export-onnx"):
        ps.merge(model, trained(subject, method))
    assert_same(before, model)


def test_scaling_a_live_adapter() -> None:
    subject = SUBJECTS[0]
    adapter = trained(subject, PFEIFFER)
    model = ps.inject(subject.model(), adapter)
    ps.rescale(model, "default", 0.5)
    assert torch.equal(subject.run(model), subject.run(ps.inject(subject.model(), ps.scale(adapter, 0.5))))
    ps.rescale(model, "default", 0.0)
    assert relative(subject.run(model), subject.run(subject.model())) < 1e-5


def test_plans() -> None:
    bert, t5 = SUBJECTS[0].model(), next(s for s in SUBJECTS if s.name == "t5").model()
    plan = ps.plan(bert, PFEIFFER, "output_adapter", task=FEATURES)
    assert [site.name for site in plan.sites] == [f"bert.encoder.layer.{i}.output" for i in range(2)]
    named = ps.plan(bert, PFEIFFER, "attention.output", layers_to_transform=[1], task=FEATURES)
    assert [site.name for site in named.sites] == ["bert.encoder.layer.1.attention.output"]
    crossed = ps.plan(t5, PFEIFFER, "cross_adapter", task=FEATURES)
    assert [site.name for site in crossed.sites] == [f"decoder.block.{i}.layer.1" for i in range(3)]
    assert "32 wide" in str(plan)
    with pytest.raises(NoSiteMatched, match="cross_adapter"):
        ps.plan(bert, PFEIFFER, "cross_adapter", task=FEATURES)
    with pytest.raises(UnsupportedSite, match="distilbert"):
        ps.plan(torch.nn.Sequential(torch.nn.Linear(2, 2)), PFEIFFER, "output_adapter")
    sliced = transformers.BloomConfig(
        hidden_size=8, n_layer=1, n_head=2, vocab_size=9, pretraining_tp=2, slow_but_exact=True
    )
    with pytest.raises(UnsupportedSite, match="slow_but_exact=False"):
        ps.plan(transformers.BloomForCausalLM(sliced), PFEIFFER, "output_adapter", task=FEATURES)
    swin = next(s for s in SUBJECTS if s.name == "swin").model()
    widths = [site.shape[0] for site in ps.plan(swin, PFEIFFER, "output_adapter", task=FEATURES).sites]
    assert widths == [16, 16, 32]


def test_what_does_not_fit_is_refused() -> None:
    bert, llama = SUBJECTS[0], next(s for s in SUBJECTS if s.name == "llama-gqa")
    model = llama.model()
    before = snapshot(model)
    with pytest.raises(UnclaimedSites):
        ps.inject(model, trained(bert, PFEIFFER))
    assert_same(before, model)
    other = ps.inject(bert.model(), trained(bert, PFEIFFER))
    with pytest.raises(AlreadyGrafted):
        ps.inject(other, trained(bert, PFEIFFER))
    for name in ("attention", "base", "a.b"):
        with pytest.raises(PlanError, match="cannot name"):
            ps.inject(other, PFEIFFER, "output_adapter", name=name, task=FEATURES)


def test_chunks() -> None:
    subject = SUBJECTS[0]
    whole = subject.run(ps.inject(subject.model(), trained(subject, PFEIFFER)))
    model = subject.model()
    for layer in model.bert.encoder.layer:
        layer.chunk_size_feed_forward = 1
    ps.inject(model, trained(subject, PFEIFFER))
    assert relative(subject.run(model), whole) < 1e-5


def test_hidden_states_are_recorded() -> None:
    subject = SUBJECTS[0]
    model = ps.inject(subject.model(), trained(subject, PFEIFFER))
    with torch.no_grad():
        states = model(**subject.inputs(), output_hidden_states=True).hidden_states
        plain = subject.model()(**subject.inputs(), output_hidden_states=True).hidden_states
    assert len(states) == len(plain)
    assert torch.equal(states[0], plain[0]) and not torch.equal(states[1], plain[1])
