"""We select what PEFT selects for the same words; where PEFT is silent about an idle word, we are not."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peftsurgery.errors import NoSiteMatched
from peftsurgery.select import Query, select
from peftsurgery.site import Kind, Site

FIXTURE = Path(__file__).parents[2] / "fixtures" / "target_matching" / "golden.json.gz"
GOLDEN = json.loads(gzip.decompress(FIXTURE.read_bytes()))["models"]
KINDS = {"Linear": Kind.LINEAR, "Conv1D": Kind.LINEAR, "Embedding": Kind.EMBEDDING}
OUTPUTS = {"lm_head"}
CASES = [(model, number) for model in GOLDEN for number in range(len(GOLDEN[model]["cases"]))]


def said(words: Any) -> Any:
    """PEFT reads a bare string as a regular expression, we as a name."""
    return f"re:{words}" if isinstance(words, str) and words != "all-linear" else words


def query_of(spec: dict[str, Any]) -> Query:
    return Query.of(
        said(spec["target_modules"]),
        said(spec.get("exclude_modules")),
        spec.get("layers_to_transform"),
        spec.get("layers_pattern"),
    )


def without(query: Query, idle: str) -> Query | None:
    """The query without the one word or layer that an error named; None where nothing of it is left."""
    targets = tuple(word for word in query.targets if word != idle)
    layers = tuple(index for index in query.layers_to_transform if str(index) != idle)
    assert (targets, layers) != (query.targets, query.layers_to_transform), f"an error names {idle!r}"
    gone = not targets or (query.layers_to_transform and not layers)
    return None if gone else replace(query, targets=targets, layers_to_transform=layers)


def selected(sites: list[Site], query: Query | None, outputs: set[str]) -> tuple[list[str], list[str]]:
    """The names that are selected, and the words that had to be dropped for it."""
    idle: list[str] = []
    while query is not None:
        try:
            return [site.name for site in select(sites, query, outputs=outputs).sites], idle
        except NoSiteMatched as error:
            idle.append(error.pattern)
            query = without(query, error.pattern)
    return [], idle


@pytest.mark.parametrize(("model", "number"), CASES)
def test_select_is_what_peft_selects(model: str, number: int) -> None:
    golden, case = GOLDEN[model], GOLDEN[model]["cases"][number]
    sites = [Site(name, KINDS.get(kind, Kind.OTHER), (1, 1)) for name, kind in golden["modules"]]
    names, idle = selected(sites, query_of(case["spec"]), OUTPUTS)
    assert sorted(names) == sorted(case["matched"])
    assert names or idle
    for word in idle:
        layer = f".{word}."
        assert not any(f".{name}".endswith(f".{word}") or layer in name for name in case["matched"])


def test_every_architecture_and_setting_is_there() -> None:
    matched = [GOLDEN[model]["cases"][number]["matched"] for model, number in CASES]
    assert len(GOLDEN) == 7
    assert len(CASES) == 7 * 28
    assert sum(map(bool, matched)) > 40


@pytest.mark.parametrize(
    "spec",
    [
        {"target_modules": ["query", "value"]},
        {"target_modules": ["dense"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["bert.encoder.layer.0.attention.self.query", "key"], "layers_to_transform": [1]},
        {
            "target_modules": r".*layer\.\d+\.(intermediate|output)\.dense",
            "exclude_modules": [r"layer.1.output.dense"],
        },
    ],
)
def test_select_agrees_with_an_injected_peft_model(spec: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = transformers.BertConfig(vocab_size=20, num_labels=3, **sizes)
    bert = transformers.BertForSequenceClassification(config)
    sites = [
        Site(name, KINDS.get(type(module).__name__, Kind.OTHER), tuple(module.weight.shape))
        for name, module in bert.named_modules()
        if hasattr(module, "weight")
    ]
    ours = {site.name for site in select(sites, query_of(spec)).sites}
    model = peft.inject_adapter_in_model(peft.LoraConfig(r=2, **spec), bert)
    theirs = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert ours == theirs
