"""Every law runs for every method that can be put at the subject, and every subject."""

from __future__ import annotations

import pytest
import torch

import peftsurgery as ps
from peftsurgery.method import Method, WeightMethod
from tests.subjects import SUBJECTS, Subject

SETTINGS: dict[str, list[Method]] = {
    "lora": [
        ps.LoRA(r=4, lora_alpha=8),
        ps.LoRA(r=3, lora_alpha=5, use_rslora=True, init_lora_weights="gaussian"),
    ]
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marks = metafunc.definition.iter_markers("parametrize")
    own = {
        name for mark in marks for name in ([mark.args[0]] if isinstance(mark.args[0], str) else mark.args[0])
    }
    if "subject" in metafunc.fixturenames and "subject" not in own:
        metafunc.parametrize("subject", SUBJECTS, ids=str)
    if "method" in metafunc.fixturenames and "method" not in own:
        weights = [name for name, kind in ps.METHODS.items() if issubclass(kind, WeightMethod)]
        named = [(f"{name}{i}", method) for name in weights for i, method in enumerate(SETTINGS[name])]
        metafunc.parametrize("method", [m for _, m in named], ids=[name for name, _ in named])


def trained(subject: Subject, method: Method, name: str = "default", seed: int = 0) -> ps.Adapter:
    """An adapter for the subject whose every parameter is away from its start."""
    model = subject.model()
    ps.inject(model, method, subject.targets, name=name, seed=seed, task="feature-extraction")
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in ps.trainable_parameters(model).values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return ps.remove(model, name)


def slack(subject: Subject) -> float:
    """The relative tolerance of one rounding of each weight, grown through the layers."""
    return 2e-5 if subject.dtype is torch.float32 else 8e-2


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())
