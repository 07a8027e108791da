"""The laws of the live place: identity, removal, fold, composition, training."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import peftsurgery as ps
from peftsurgery.method import Method, WeightMethod
from tests.laws.conftest import relative, slack, trained
from tests.subjects import Subject, output


def snapshot(model: torch.nn.Module) -> dict[str, object]:
    """Everything that surgery must give back."""
    return {
        "state": {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()},
        "modules": [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)],
        "grad": [(name, p.requires_grad) for name, p in model.named_parameters()],
        "training": [module.training for module in model.modules()],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "dict": sorted(model.__dict__),
    }


def assert_same(before: dict[str, object], model: torch.nn.Module) -> None:
    after = snapshot(model)
    old, new = before.pop("state"), after.pop("state")
    assert before == after
    assert old.keys() == new.keys()
    for name, (identity, value) in old.items():
        assert new[name][0] == identity, name
        assert torch.equal(new[name][1], value), name


def test_identity(subject: Subject, method: Method) -> None:
    model = subject.model()
    before = subject.run(model)
    model = ps.inject(model, method, subject.targets)
    assert torch.equal(subject.run(model), before)


def test_removal(subject: Subject, method: Method) -> None:
    model = subject.model()
    next(model.parameters()).requires_grad_(False)
    handle = next(iter(model.children())).register_forward_hook(lambda *_: None)
    before, out = snapshot(model), subject.run(model)
    ps.inject(model, trained(subject, method))
    assert not torch.equal(subject.run(model), out)
    ps.remove(model)
    assert_same(before, model)
    handle.remove()


def test_round_trip_on_a_model(subject: Subject, method: Method) -> None:
    adapter = trained(subject, method)
    model = ps.inject(subject.model(), adapter)
    assert ps.remove(model) == adapter


def test_fold_equals_graft(subject: Subject, method: Method) -> None:
    adapter = trained(subject, method)
    grafted = subject.run(ps.inject(subject.model(), adapter))
    merged, plain = subject.model(), subject.run(subject.model())
    ps.merge(merged, adapter)
    assert relative(subject.run(merged), grafted) <= slack(subject)
    assert relative(plain, grafted) > 3 * slack(subject), "an adapter that does nothing proves nothing"


def test_forward_is_fold(subject: Subject, method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ps.inject(subject.model(), trained(subject, method))
    fast = subject.run(model)
    monkeypatch.setattr(type(method), "forward", WeightMethod.forward)
    assert relative(subject.run(model), fast) <= slack(subject)


def test_undo(subject: Subject, method: Method) -> None:
    model = subject.model()
    before = snapshot(model)
    undo = ps.merge(model, trained(subject, method))
    assert any(id(p) not in {i for i, _ in before["state"].values()} for p in model.parameters())
    undo()
    assert_same(before, model)


def test_composition(subject: Subject, method: Method) -> None:
    a, b = trained(subject, method, "a", 0), trained(subject, method, "b", 7)
    alone = subject.run(ps.inject(subject.model(), b))
    both = ps.inject(ps.inject(subject.model(), a), b)
    together = subject.run(both)
    merged = subject.model()
    ps.merge(merged, [a, b])
    assert relative(subject.run(merged), together) <= slack(subject)
    ps.activate(both, "b")
    assert torch.equal(subject.run(both), alone)
    ps.activate(both, "a", "b")
    assert torch.equal(subject.run(both), together)
    ps.remove(both, "a")
    assert torch.equal(subject.run(both), alone)


def test_folding_one_after_the_other(subject: Subject, method: Method) -> None:
    a, b = trained(subject, method, "a", 0), trained(subject, method, "b", 7)
    tensors = {name: t.double() for name, t in subject.model().state_dict().items()}
    both = dict(ps.folded(tensors.items(), a, b))
    twice = dict(ps.folded(ps.folded(tensors.items(), a), b))
    assert both.keys() == tensors.keys()
    assert all(torch.equal(both[name], twice[name]) for name in both)


def test_scale(subject: Subject, method: Method) -> None:
    adapter = trained(subject, method)
    model = ps.inject(subject.model(), adapter)
    ps.rescale(model, "default", 0.5)
    halved = ps.inject(subject.model(), ps.scale(adapter, 0.5))
    assert torch.equal(subject.run(model), subject.run(halved))
    ps.rescale(model, "default", 0.0)
    assert relative(subject.run(model), subject.run(subject.model())) <= slack(subject)


def test_training_moves_theta_only(subject: Subject, method: Method) -> None:
    model = ps.inject(subject.model(), trained(subject, method)).train()
    theta = set(ps.trainable_parameters(model))
    assert theta == {name for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    output(model(**subject.inputs())).float().pow(2).sum().backward()
    optimiser.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == theta


def test_copies_and_pickles(subject: Subject, method: Method) -> None:
    model = ps.inject(subject.model(), trained(subject, method))
    before = subject.run(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(subject.run(twin), before)
        assert ps.remove(twin) == ps.remove(copy.deepcopy(model))
    fresh = ps.inject(subject.model(), trained(subject, method, seed=5))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(subject.run(fresh), before)


def test_failure_leaves_the_model(subject: Subject, method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftsurgery.live import surgery

    model, adapter = subject.model(), trained(subject, method)
    before = snapshot(model)
    real, calls = surgery.WeightGraft, []

    def failing(*args: object) -> object:
        calls.append(args)
        if len(calls) == len(adapter.plan.steps):
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(surgery, "WeightGraft", failing)
    with pytest.raises(KeyboardInterrupt):
        ps.inject(model, adapter)
    assert_same(before, model)
