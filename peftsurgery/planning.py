"""A plan puts formulas at names. Making one validates everything and touches nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from peftsurgery.errors import NoSiteMatched, PlanError, UnsupportedSite, listing, nearest
from peftsurgery.method import Method
from peftsurgery.select import Query, key_matches, select
from peftsurgery.site import Kind, Site

Refine = Callable[[Site, Method], Method]
"""Turns the method of a plan into the method of one site."""


def keep(site: Site, method: Method) -> Method:
    """The refinement that refines nothing."""
    return method


@dataclass(frozen=True, slots=True)
class Step:
    """One formula at one name."""

    site: Site
    method: Method


@dataclass(frozen=True, slots=True)
class Plan:
    """What goes where. `print(plan)` is the dry run.

    Args:
        steps: one formula at one name each, in the model's order.
        query: the words that chose the sites, where words did.
        modules_to_save: names of modules that get a trainable copy of their own (heads).
        bias: `none`, `lora_only` (the sites' biases train) or `all` (every bias trains).
    """

    steps: tuple[Step, ...]
    query: Query | None = None
    modules_to_save: tuple[str, ...] = ()
    bias: str = "none"
    hits: Mapping[str, int] = field(default_factory=dict, compare=False)

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(step.site for step in self.steps)

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def plan(
    sites: Iterable[Site],
    method: Method,
    *,
    targets: str | Sequence[str] | Query,
    refine: Refine = keep,
    reserved: Collection[str] = (),
    outputs: Collection[str] = (),
) -> Plan:
    """Put `method` at every site that `targets` names.

    Args:
        sites: what the model, checkpoint or graph offers.
        targets: patterns, or a `Query` with exclusions and layer ranges.
        refine: the method of one site, e.g. `by_pattern(r={"layer.0": 4})`.
        reserved: modules that are never targeted (those in `modules_to_save`).
        outputs: output heads that `all-linear` passes over.

    Raises:
        NoSiteMatched: a pattern, an exclusion or a layer index selects nothing.
        UnsupportedSite: a selected site cannot carry the method.
    """
    query = targets if isinstance(targets, Query) else Query.of(targets)
    chosen = select(sites, query, outputs=outputs, reserved=reserved)
    steps = tuple(_step(site, method, refine) for site in chosen.sites)
    return Plan(steps, query, hits={word: len(names) for word, names in chosen.hits.items()})


def by_pattern(sites: Iterable[Site], **patterns: Mapping[str, object]) -> Refine:
    """A refinement from PEFT's `rank_pattern` and `alpha_pattern`: one mapping per field of the method.

    A key matches a site as in PEFT: `re.match(r"(.*\\.)?(KEY)$", name)`; the first match wins.

    Raises:
        NoSiteMatched: a key matches none of `sites`.
    """
    names = [site.name for site in sites]
    for fields in patterns.values():
        for key in fields:
            if not any(key_matches(key, name) for name in names):
                near = nearest(key, names)
                raise NoSiteMatched(
                    f"The pattern {key!r} matched none of {len(names)} targeted sites. "
                    f"Nearest: {listing(near)}. Nothing was changed.",
                    pattern=key,
                    nearest=near,
                )

    def refined(site: Site, method: Method) -> Method:
        found = {
            name: next(value for key, value in fields.items() if key_matches(key, site.name))
            for name, fields in patterns.items()
            if any(key_matches(key, site.name) for key in fields)
        }
        return replace(method, **found) if found else method

    return refined


def _step(site: Site, method: Method, refine: Refine) -> Step:
    reason = method.check(site)
    if reason is not None:
        raise UnsupportedSite(
            f"{site.name!r} {reason}. Exclude it (`exclude_modules=[{site.name!r}]`) or narrow the targets; "
            "nothing was changed.",
            site=site.name,
        )
    return Step(site, refine(site, method))


def _lines(plan: Plan) -> Iterable[str]:
    counts = Counter(repr(step.method) for step in plan.steps)
    yield f"{len(plan.steps)} sites"
    for word, hits in plan.hits.items():
        yield f"  {word!r}: {hits} sites"
    for method, count in counts.items():
        yield f"  {method} at {count}"
    width = max((len(site.name) for site in plan.sites), default=0)
    for site in plan.sites:
        kind = "" if site.kind is Kind.LINEAR else f"  {site.kind.value}"
        yield f"    {site.name:<{width}}  {site.extent}{kind}"
    for name in plan.modules_to_save:
        yield f"    {name:<{width}}  a trainable copy (modules_to_save)"


__all__ = ["Plan", "PlanError", "Query", "Refine", "Step", "by_pattern", "keep", "plan"]
