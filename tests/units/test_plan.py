"""A plan puts formulas at names, refuses what does not fit, and prints as the dry run."""

from __future__ import annotations

import pytest

from peftsurgery.errors import NoSiteMatched, PlanError, UnsupportedSite
from peftsurgery.methods import LoRA
from peftsurgery.planning import Query, by_pattern, plan
from peftsurgery.site import Kind, Layout, Site

SITES = [
    Site("wte", Kind.EMBEDDING, (50, 8), Layout.IN_OUT),
    *(
        Site(f"h.{layer}.{name}", kind, shape, Layout.IN_OUT)
        for layer in range(3)
        for name, kind, shape in [
            ("attn.c_attn", Kind.LINEAR, (8, 24)),
            ("ln_1", Kind.OTHER, (8,)),
        ]
    ),
    Site("score", Kind.LINEAR, (2, 8)),
]


def test_steps_come_in_the_models_order() -> None:
    made = plan(SITES, LoRA(), targets=["c_attn", "wte"])
    assert [site.name for site in made.sites] == ["wte", *(f"h.{layer}.attn.c_attn" for layer in range(3))]
    assert made.query == Query.of(["c_attn", "wte"])
    assert made.hits == {"c_attn": 3, "wte": 1}
    assert {step.method for step in made.steps} == {LoRA()}


def test_reserved_modules_are_never_targeted() -> None:
    assert [site.name for site in plan(SITES, LoRA(), targets="all-linear", reserved={"score"}).sites] == [
        f"h.{layer}.attn.c_attn" for layer in range(3)
    ]
    with pytest.raises(NoSiteMatched, match=r"'score' matched 1 site"):
        plan(SITES, LoRA(), targets="score", reserved={"score"})
    excluding = Query.of("all-linear", exclude_modules="score")
    assert len(plan(SITES, LoRA(), targets=excluding, reserved={"score"}).steps) == 3


def test_a_site_that_cannot_carry_the_method_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedSite, match=r"'h\.0\.ln_1'") as caught:
        plan(SITES, LoRA(), targets="c_attn,ln_1")
    assert caught.value.site == "h.0.ln_1"
    assert "exclude_modules=['h.0.ln_1']" in str(caught.value)


def test_patterns_refine_step_by_step_and_the_first_match_wins() -> None:
    linear = [site for site in SITES if site.name.endswith("c_attn")]
    refine = by_pattern(linear, r={"h.1.attn.c_attn": 2, "c_attn": 4}, lora_alpha={r"h\.[01]\..*": 32})
    made = plan(SITES, LoRA(r=8, lora_alpha=16), targets="c_attn", refine=refine)
    assert [step.method for step in made.steps] == [
        LoRA(r=4, lora_alpha=32),
        LoRA(r=2, lora_alpha=32),
        LoRA(r=4, lora_alpha=16),
    ]


def test_a_pattern_that_refines_nothing_is_refused() -> None:
    with pytest.raises(NoSiteMatched, match="'c_atn' matched none of 8") as caught:
        by_pattern(SITES, r={"c_atn": 4})
    assert "c_attn" in caught.value.nearest


def test_a_broken_pattern_is_refused() -> None:
    with pytest.raises(PlanError, match="no regular expression"):
        by_pattern(SITES, r={"(c_attn": 4})


def test_printing_is_the_dry_run() -> None:
    shown = str(plan(SITES, LoRA(r=4), targets="c_attn,wte"))
    assert shown.splitlines()[:3] == ["4 sites", "  'c_attn': 3 sites", "  'wte': 1 sites"]
    assert "h.2.attn.c_attn  8 → 24" in shown
    assert "embedding" in shown
    assert "r=4" in shown
