"""A grafted model is an ordinary torch model: compiled, exported, checkpointed, moved, cast by autocast."""

from __future__ import annotations

import pytest
import torch

import peftsurgery as ps
from peftsurgery.method import Method
from tests.laws.conftest import relative, slack, trained
from tests.subjects import BF16, CONV1D, ENCODER, GQA, SEQ2SEQ, Subject, output

TRANSFORMERS = (ENCODER, CONV1D, GQA, SEQ2SEQ, BF16)


def test_compile(subject: Subject, method: Method) -> None:
    model = ps.inject(subject.model(), trained(subject, method))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    try:
        assert relative(subject.run(compiled), subject.run(model)) <= slack(subject)
    finally:
        torch.compiler.reset()


def test_export(subject: Subject, method: Method) -> None:
    model = ps.inject(subject.model(), trained(subject, method))
    uncached = (
        {"use_cache": False} if hasattr(model, "config") else {}
    )  # a cache is no output that torch exports
    inputs = {**subject.inputs(), **uncached}
    exported = torch.export.export(model, (), kwargs=inputs, strict=False)
    with torch.no_grad():
        assert relative(output(exported.module()(**inputs)), subject.run(model)) <= slack(subject)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("subject", TRANSFORMERS, ids=str)
def test_gradient_checkpointing(subject: Subject, method: Method, reentrant: bool) -> None:
    def gradients(checkpointed: bool) -> dict[str, torch.Tensor]:
        model = ps.inject(subject.model(), trained(subject, method)).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        output(model(**subject.inputs(), use_cache=False)).float().pow(2).sum().backward()
        return {name: p.grad for name, p in ps.trainable_parameters(model).items()}

    expected, found = gradients(False), gradients(True)
    for name, gradient in expected.items():
        assert found[name] is not None, name
        assert relative(found[name], gradient) <= 10 * slack(subject), name


def test_autocast(subject: Subject, method: Method) -> None:
    model = ps.inject(subject.model(), trained(subject, method))
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(subject.run(model), subject.run(subject.model())) > 0
        assert torch.isfinite(subject.run(model)).all()


def test_moves_with_the_model(subject: Subject, method: Method) -> None:
    model = ps.inject(subject.model(), trained(subject, method)).double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    ps.remove(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
