"""What a word means, what it selects, and what is said when it selects nothing."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftsurgery.errors import NoSiteMatched, PlanError
from peftsurgery.select import Query, chosen, key_matches, select
from peftsurgery.site import Kind, Site

LAYERS = range(12)
SITES = [
    Site("embed_tokens", Kind.EMBEDDING, (10, 4)),
    *(
        Site(f"model.layers.{layer}.{name}", kind, (4, 4))
        for layer in LAYERS
        for name, kind in [
            ("norm", Kind.OTHER),
            ("attn.q_proj", Kind.LINEAR),
            ("attn.v_proj", Kind.LINEAR),
            ("mlp.experts.3.up_proj", Kind.LINEAR),
        ]
    ),
    Site("lm_head", Kind.LINEAR, (10, 4)),
]
NAMES = [site.name for site in SITES]


def names(targets: Any, *, outputs: tuple[str, ...] = (), **rest: Any) -> list[str]:
    return [site.name for site in select(SITES, Query.of(targets, **rest), outputs=outputs).sites]


def ending(*ends: str) -> list[str]:
    return [name for name in NAMES if name.endswith(ends)]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("q_proj", ending(".q_proj")),
        ("q_proj, v_proj", ending(".q_proj", ".v_proj")),
        (["v_proj", "q_proj"], ending(".q_proj", ".v_proj")),
        ("attn.q_proj", ending(".q_proj")),
        ("model.layers.3.attn.q_proj", ["model.layers.3.attn.q_proj"]),
        ("lm_head", ["lm_head"]),
        ("norm", ending(".norm")),
        ("layers.1?.attn.*", [f"model.layers.{i}.attn.{p}_proj" for i in (10, 11) for p in "qv"]),
        ("*_proj", ending("_proj")),
        ("[qv]_proj", ending(".q_proj", ".v_proj")),
        ("model.layers.[0-2].*.q_proj", [f"model.layers.{i}.attn.q_proj" for i in range(3)]),
        (r"re:.*\.(q|v)_proj", ending(".q_proj", ".v_proj")),
        (
            r"re:model\.layers\.\d{2,2}\.attn\.q_proj",
            ["model.layers.10.attn.q_proj", "model.layers.11.attn.q_proj"],
        ),
        ([r"re:.*\.q_proj", "lm_head"], [*ending(".q_proj"), "lm_head"]),
        (re.compile(r".*\.Q_PROJ", re.IGNORECASE), ending(".q_proj")),
        ([re.compile(r"lm_.*"), "v_proj"], [*ending(".v_proj"), "lm_head"]),
        ("all-linear", [*ending("_proj"), "lm_head"]),
        ("ALL-LINEAR,embed_tokens", ["embed_tokens", *ending("_proj"), "lm_head"]),
    ],
)
def test_words(targets: Any, expected: list[str]) -> None:
    assert names(targets) == expected


def test_all_linear_passes_over_the_output_head() -> None:
    assert names("all-linear", outputs=("lm_head",)) == ending("_proj")
    assert names("all-linear,lm_head", outputs=("lm_head",)) == [*ending("_proj"), "lm_head"]


def test_exclusions_take_away_again() -> None:
    assert names("*_proj", exclude_modules="v_proj,experts.*.up_proj") == ending(".q_proj")
    assert names("q_proj", exclude_modules=["layers.0.attn.q_proj"]) == ending(".q_proj")[1:]
    assert names("all-linear", exclude_modules=r"re:.*experts.*|lm_head") == ending(".q_proj", ".v_proj")
    assert names("all-linear", exclude_modules="lm_head", outputs=("lm_head",)) == ending("_proj")


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (3, [3]),
        ([1, 10], [1, 10]),
        ("0-2,7", [0, 1, 2, 7]),
        (["4-5", 9], [4, 5, 9]),
        ("0", [0]),
        ((), list(LAYERS)),
    ],
)
def test_layers(layers: Any, expected: list[int]) -> None:
    assert names("q_proj", layers_to_transform=layers) == [f"model.layers.{i}.attn.q_proj" for i in expected]


def test_the_layer_is_the_first_number_and_not_the_experts() -> None:
    assert names("up_proj", layers_to_transform=5) == ["model.layers.5.mlp.experts.3.up_proj"]
    every = [f"model.layers.{i}.mlp.experts.3.up_proj" for i in LAYERS]
    assert names("up_proj", layers_to_transform=3, layers_pattern="experts") == every
    assert names("up_proj", layers_to_transform=3, layers_pattern=["h", "layers"]) == [every[3]]


def test_layers_bind_every_word_but_a_full_name() -> None:
    full = "model.layers.9.attn.v_proj"
    assert names(["q_proj", full], layers_to_transform=2) == ["model.layers.2.attn.q_proj", full]
    assert names(r"re:.*\.q_proj", layers_to_transform=2) == ["model.layers.2.attn.q_proj"]
    assert len(names("all-linear", layers_to_transform="2-3", outputs=("lm_head",))) == 6


def test_hits_are_counted_per_word_after_exclusions_and_layers() -> None:
    query = Query.of("q_proj,v_proj", "layers.1.attn.v_proj", "0-1")
    hits = select(SITES, query).hits
    assert hits == {
        "q_proj": ("model.layers.0.attn.q_proj", "model.layers.1.attn.q_proj"),
        "v_proj": ("model.layers.0.attn.v_proj",),
    }


@pytest.mark.parametrize(
    ("arguments", "pattern", "nearest"),
    [
        ({"targets": "q_prj"}, "q_prj", "q_proj"),
        ({"targets": ["v_proj", "attn.q_prj"]}, "attn.q_prj", "q_proj"),
        ({"targets": "proj"}, "proj", "q_proj"),
        ({"targets": "Q_proj"}, "Q_proj", "q_proj"),
        ({"targets": r"re:.*\.(q_prj)"}, r"re:.*\.(q_prj)", "q_proj"),
        ({"targets": "*.lm_hed"}, "*.lm_hed", "lm_head"),
        ({"targets": "q_proj", "exclude_modules": "v_prj"}, "v_prj", "v_proj"),
        ({"targets": "q_proj", "layers_to_transform": [1, 99]}, "99", "11"),
        ({"targets": "q_proj", "layers_to_transform": [1], "layers_pattern": "h"}, "1", None),
        ({"targets": "lm_head,q_proj", "exclude_modules": "lm_head"}, "lm_head", "lm_head"),
    ],
)
def test_an_idle_word_is_refused_with_the_nearest(arguments: Any, pattern: str, nearest: str | None) -> None:
    with pytest.raises(NoSiteMatched) as caught:
        select(SITES, Query.of(**arguments))
    assert caught.value.pattern == pattern
    assert pattern in str(caught.value).replace("\\\\", "\\")
    assert "othing was changed" in str(caught.value)
    assert (nearest in caught.value.nearest) if nearest else (caught.value.nearest == ())


def test_the_message_says_it_in_the_users_words() -> None:
    with pytest.raises(NoSiteMatched) as caught:
        select(SITES, Query.of("q_prj"))
    assert str(caught.value).startswith("'q_prj' matched none of 50 sites. Nearest: 'q_proj' (12 sites), ")


def test_a_regular_expression_without_its_prefix_is_recognised() -> None:
    with pytest.raises(NoSiteMatched, match=r"As a regular expression it is 're:\.\*"):
        select(SITES, Query.of([r".*\.(q|v)_proj"]))


def test_nothing_offered_is_an_error_too() -> None:
    with pytest.raises(NoSiteMatched, match="matched none of 0 sites"):
        select([], Query.of("q_proj"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"targets": ""}, "No target"),
        ({"targets": []}, "No target"),
        ({"targets": " , "}, "No target"),
        ({"targets": [3]}, "3 is no pattern"),
        ({"targets": "re:(q_proj"}, "no regular expression"),
        ({"targets": "q_proj", "exclude_modules": ["re:["]}, "no regular expression"),
        ({"targets": "q_proj", "layers_to_transform": 1, "layers_pattern": "("}, "no regular expression"),
        ({"targets": "q_proj", "layers_to_transform": "1-"}, "names no layers"),
        ({"targets": "q_proj", "layers_to_transform": "one"}, "names no layers"),
        ({"targets": "q_proj", "layers_to_transform": -1}, "names no layers"),
        ({"targets": "q_proj", "layers_to_transform": "7-3"}, "no range of layers"),
        ({"targets": "q_proj", "layers_to_transform": "0-999999999"}, "no range of layers"),
        ({"targets": "q_proj", "layers_pattern": "layers"}, "comes without layers"),
    ],
)
def test_a_query_that_means_nothing_is_refused(arguments: Any, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        Query.of(**arguments)


def test_chosen_forgives_idle_words() -> None:
    query = Query.of("q_proj,k_proj", "o_proj", "0,99")
    assert [site.name for site in chosen(SITES, query).sites] == ["model.layers.0.attn.q_proj"]
    assert chosen(SITES, query).hits["k_proj"] == ()


@given(st.sets(st.sampled_from(NAMES), min_size=1))
def test_full_names_select_themselves_in_the_models_order(some: set[str]) -> None:
    exact = [site.name for site in select(SITES, Query.of(sorted(some))).sites]
    assert exact == [name for name in NAMES if name in some]


@pytest.mark.parametrize(
    ("key", "matches"),
    [
        ("attn.q_proj", True),
        ("q_proj", True),
        ("model.layers.3.attn.q_proj", True),
        (r"layers\.[0-3]\.attn\.q_proj", True),
        ("_proj", False),
        ("q_pro", False),
        ("layers.3", False),
        (r"^model\.layers\.3\..*", True),
        ("q_proj|x", True),
    ],
)
def test_rank_pattern_keys(key: str, matches: bool) -> None:
    name = "model.layers.3.attn.q_proj"
    assert key_matches(key, name) is matches
    assert bool(re.match(rf"(.*\.)?({key})$", name)) is matches


def test_selecting_is_linear_in_the_sites() -> None:
    def seconds(layers: int) -> float:
        words = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
        many = [
            Site(f"m.layers.{i}.{w}", Kind.LINEAR, (1, 1)) for i in range(layers) for w in words.split(",")
        ]
        started = time.process_time()
        assert len(select(many, Query.of(words)).sites) == len(many)
        return time.process_time() - started

    assert min(seconds(1170) for _ in range(3)) < 0.1
