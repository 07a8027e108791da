"""The laws of token methods that need no model: start, bake, round trip, atomicity, fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import peftsurgery as ps
from peftsurgery.adapter import check, rebased
from peftsurgery.disk import peft as files
from peftsurgery.errors import MismatchedTensors, NotFoldable, SurgeryError, UnclaimedSites
from peftsurgery.method import TABLE, TokenMethod
from peftsurgery.site import Kind, Site
from tests.laws.test_file_laws import digest
from tests.soft import EVERY, METHODS, SETTINGS, fresh, places, trained

every = pytest.mark.parametrize("soft", EVERY, ids=repr)
stored = pytest.mark.parametrize("soft", METHODS, ids=repr)


def test_every_token_method_obeys_the_laws() -> None:
    known = {name: kind for name, kind in ps.METHODS.items() if issubclass(kind, TokenMethod)}
    assert known.keys() == SETTINGS.keys()
    assert all({type(m) for m in methods} == {known[name]} for name, methods in SETTINGS.items())


@every
def test_a_start_is_announced_and_reproducible(soft: TokenMethod) -> None:
    start, again, other = fresh(soft), fresh(soft), fresh(soft, seed=1)
    assert {name: tuple(p.shape) for name, p in start.items()} == soft.shared_shapes(places(soft))
    assert {p.dtype for p in start.values()} == {torch.float32}
    assert all(torch.equal(start[name], again[name]) for name in start)
    same = all(torch.equal(start[name], other[name]) for name in start)
    assert same == (soft.start_text is not None or not soft.trainable)


@every
def test_tokens_have_their_shape_and_every_parameter_a_gradient(soft: TokenMethod) -> None:
    params = {name: p.requires_grad_() for name, p in trained(soft).shared.items()}
    tokens = soft.tokens(params)
    width = 24 if Kind.TOKENS in soft.kinds else 2 * 3 * 2 * 4
    halves = getattr(soft, "num_transformer_submodules", 1)
    assert tokens.shape == (soft.num_virtual_tokens * halves, width)
    weights = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(2))
    (tokens * weights).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in params.values())


@every
def test_baking_changes_no_token(soft: TokenMethod) -> None:
    adapter = trained(soft)
    baked = ps.bake(adapter)
    assert isinstance(baked, ps.Adapter)
    method = baked.plan.steps[0].method
    assert isinstance(method, TokenMethod)
    assert torch.equal(method.tokens(baked.shared), soft.tokens(adapter.shared))
    assert baked.shared.keys() == {TABLE} and not baked.shared[TABLE].requires_grad
    assert method.num_virtual_tokens == soft.num_virtual_tokens
    assert baked.plan.sites == adapter.plan.sites
    assert (baked.replaced, baked.task_type, baked.base) == (
        adapter.replaced,
        adapter.task_type,
        adapter.base,
    )
    assert check(baked) is baked


@every
def test_baking_twice_is_baking_once(soft: TokenMethod) -> None:
    baked = ps.bake(trained(soft))
    assert ps.bake(baked) is baked


@every
def test_baking_needs_no_gradient_and_drops_nothing(soft: TokenMethod) -> None:
    adapter = trained(soft)
    learning = replace(
        adapter, shared={name: p.clone().requires_grad_() for name, p in adapter.shared.items()}
    )
    assert ps.bake(learning) == ps.bake(adapter)
    assert ps.bake(learning) is learning or not ps.bake(learning).shared[TABLE].requires_grad


@every
def test_tokens_are_the_same_bits_with_and_without_gradients(soft: TokenMethod) -> None:
    params = {name: p.requires_grad_() for name, p in trained(soft).shared.items()}
    learning = soft.tokens(params)
    with torch.no_grad():
        assert torch.equal(soft.tokens(params), learning)
    with torch.inference_mode():
        assert torch.equal(soft.tokens(params), learning)


def test_dropout_belongs_to_training() -> None:
    soft = ps.PTuning(5, "LSTM", 6, encoder_dropout=0.5)
    params = trained(soft).shared
    assert torch.equal(soft.tokens(params), soft.tokens(params))
    assert not torch.equal(soft.tokens(params, training=True), soft.tokens(params))


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tokens_keep_their_dtype(soft: TokenMethod, dtype: torch.dtype) -> None:
    params = trained(soft).shared
    tokens = soft.tokens({name: p.to(dtype) for name, p in params.items()})
    assert tokens.dtype is dtype
    slack = 1e-6 if dtype is torch.float64 else 0.05
    assert (tokens - soft.tokens(params)).abs().max() <= slack * soft.tokens(params).abs().max()


@stored
def test_round_trip(soft: TokenMethod, tmp_path: Path) -> None:
    adapter = trained(soft)
    ps.save_adapter(adapter, tmp_path / "one")
    read = ps.load_adapter(tmp_path / "one")
    assert {n: t.tolist() for n, t in read.tensors()} == {n: t.tolist() for n, t in adapter.tensors()}
    assert {step.method for step in read.plan.steps} == {soft}
    assert len(read.plan.steps) == len(adapter.plan.steps)
    assert (read.task_type, read.base) == (adapter.task_type, adapter.base)
    assert read.plan.modules_to_save == adapter.plan.modules_to_save
    ps.save_adapter(read, tmp_path / "two")
    assert digest(tmp_path / "one") == digest(tmp_path / "two")


@every
def test_an_encoder_is_a_file_of_its_own(soft: TokenMethod, tmp_path: Path) -> None:
    adapter = trained(soft)
    ps.save_adapter(adapter, tmp_path / "whole")
    ps.save_adapter(ps.bake(adapter), tmp_path / "baked")
    has_encoder = TABLE not in adapter.shared
    assert (tmp_path / "whole" / files.ENCODER).exists() == has_encoder
    assert not (tmp_path / "baked" / files.ENCODER).exists()
    tables = [(tmp_path / folder / files.TENSORS).read_bytes() for folder in ("whole", "baked")]
    assert tables[0] == tables[1]


@every
def test_without_its_encoder_an_adapter_is_the_baked_one(soft: TokenMethod, tmp_path: Path) -> None:
    ps.save_adapter(trained(soft), tmp_path / "a")
    (tmp_path / "a" / files.ENCODER).unlink(missing_ok=True)
    read, baked = ps.load_adapter(tmp_path / "a"), ps.bake(trained(soft))
    assert {n: t.tolist() for n, t in read.tensors()} == {n: t.tolist() for n, t in baked.tensors()}
    assert {step.method for step in read.plan.steps} == {step.method for step in baked.plan.steps}


@stored
@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
def test_a_failed_save_leaves_nothing(
    soft: TokenMethod, failure: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = trained(soft)

    def failing(*args: object, **kwargs: object) -> None:
        raise failure(28, "No space left on device")

    monkeypatch.setattr("os.fsync", failing)
    with pytest.raises((SurgeryError, KeyboardInterrupt)):
        ps.save_adapter(adapter, tmp_path / "deep" / "out")
    assert list(tmp_path.iterdir()) == []


@every
def test_what_was_read_finds_its_places_in_the_base(soft: TokenMethod, tmp_path: Path) -> None:
    ps.save_adapter(trained(soft), tmp_path / "a")
    sites = [Site("a.linear", Kind.LINEAR, (24, 24)), *places(soft)]
    moved, _ = rebased(ps.load_adapter(tmp_path / "a"), sites)
    assert moved.plan.sites == places(soft)
    assert moved.params == {site.name: {} for site in places(soft)}
    renamed = [replace(site, name=f"bert.{site.name}") for site in places(soft)]
    assert rebased(trained(soft), renamed)[0].plan.sites == tuple(renamed)


@every
def test_another_base_is_refused(soft: TokenMethod) -> None:
    adapter = trained(soft)
    wider = [replace(site, shape=(site.shape[0], site.shape[1] + 2)) for site in places(soft)]
    with pytest.raises(MismatchedTensors, match="trained on another base"):
        rebased(adapter, wider)
    with pytest.raises(UnclaimedSites, match="the base offers 0"):
        rebased(adapter, [Site("encoder.words", Kind.EMBEDDING, (67, 24))])


@every
def test_tokens_do_not_fold(soft: TokenMethod) -> None:
    with pytest.raises(NotFoldable, match="export-onnx"):
        list(ps.folded([("encoder.words.weight", torch.zeros(67, 24))], trained(soft)))
    with pytest.raises(NotFoldable):
        ps.scale(trained(soft), 0.5)


def test_a_weight_adapter_bakes_to_itself() -> None:
    site = Site("a.q", Kind.LINEAR, (6, 4))
    method = ps.LoRA(r=2)
    adapter = ps.Adapter(ps.Plan((ps.Step(site, method),)), {"a.q": method.init(site, None)})
    assert ps.bake(adapter) is adapter
