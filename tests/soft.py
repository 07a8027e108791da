"""Soft prompts for the tests: token methods in several settings, and adapters of them, without models."""

from __future__ import annotations

import torch
from torch import Tensor

import peftsurgery as ps
from peftsurgery.method import TokenMethod
from peftsurgery.planning import Plan, Step
from peftsurgery.site import Kind, Layout, Site

WORDS = (Site("encoder.words", Kind.TOKENS, (67, 24), Layout.IN_OUT),)
LAYERS = tuple(Site(f"encoder.{layer}.attention", Kind.ATTENTION, (2, 4)) for layer in range(3))
IDS = (3, 5, 8)
TEXT = {"prompt_tuning_init_text": "is it a complaint", "tokenizer_name_or_path": "org/tokenizer"}

SETTINGS: dict[str, list[TokenMethod]] = {
    "prompt-tuning": [
        ps.PromptTuning(5),
        ps.PromptTuning(4, num_transformer_submodules=2),
        ps.PromptTuning(5, prompt_tuning_init="TEXT", **TEXT),
        ps.PromptTuning(5, prompt_tuning_init="SAMPLE_VOCAB"),
    ],
    "p-tuning": [
        ps.PTuning(5),
        ps.PTuning(4, encoder_hidden_size=7, num_transformer_submodules=2),
        ps.PTuning(5, "LSTM", 6, encoder_dropout=0.3),
        ps.PTuning(5, "LSTM", encoder_num_layers=1),
    ],
    "prefix-tuning": [
        ps.PrefixTuning(5),
        ps.PrefixTuning(5, prefix_projection=True),
        ps.PrefixTuning(5, prefix_projection=True, encoder_hidden_size=9, init_weights="zero"),
    ],
}
METHODS = [method for methods in SETTINGS.values() for method in methods]
EVERY = [*METHODS, ps.HardPrompt((7, 2, 7))]


def vocabulary() -> Tensor:
    return torch.randn(67, 24, generator=torch.Generator().manual_seed(3))


def places(method: TokenMethod) -> tuple[Site, ...]:
    return WORDS if Kind.TOKENS in method.kinds else LAYERS


def fresh(method: TokenMethod, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = IDS if method.start_text else ()
    return method.init_shared(places(method), generator, vocabulary(), ids)


def trained(method: TokenMethod, *, head: bool = True, name: str = "default") -> ps.Adapter:
    """An adapter whose every parameter is away from its start, with a head that it replaces."""
    generator = torch.Generator().manual_seed(1)
    shared = {k: p + 0.2 * torch.randn(p.shape, generator=generator) for k, p in fresh(method).items()}
    steps = tuple(Step(site, method) for site in places(method))
    heads = {"classifier.weight": torch.randn(3, 24, generator=generator), "classifier.bias": torch.ones(3)}
    return ps.Adapter(
        Plan(steps, modules_to_save=("classifier",) if head else ()),
        {step.site.name: {} for step in steps},
        name,
        shared=shared,
        replaced=heads if head else {},
        task_type="SEQ_CLS" if head else None,
        base="org/base",
    )
