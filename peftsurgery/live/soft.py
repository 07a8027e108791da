"""Virtual tokens for `surgery`: the plan, the grafts and hooks of an adapter, and taking it off again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from peftsurgery.adapter import Adapter
from peftsurgery.errors import PlanError
from peftsurgery.live import prefixes, prompts
from peftsurgery.live.anatomy import Family, body, embedding_below, position_limit, token_sites
from peftsurgery.live.attention import PrefixGraft
from peftsurgery.live.chart import chart
from peftsurgery.live.grafts import Graft, Theta
from peftsurgery.live.swap import Hook
from peftsurgery.live.tokens import TokenGraft, carriers
from peftsurgery.method import TokenMethod
from peftsurgery.planning import Plan, Step
from peftsurgery.reading import Reading
from peftsurgery.site import Kind, Site


def plan(model: nn.Module, method: TokenMethod) -> Plan:
    """Where `method` goes: the model's one place for such tokens, so there is nothing to choose.

    Raises:
        PlanError: the model has no place for them, or not for so many.
    """
    _check_room(model, method)
    method = method.halved() if body(model).family is Family.ENCODER_DECODER else method
    return Plan(tuple(Step(site, method) for site in token_sites(model, method.kinds)))


def method_of(plan: Plan) -> TokenMethod | None:
    """The plan's method, if it is one of virtual tokens."""
    method = plan.steps[0].method if plan.steps else None
    return method if isinstance(method, TokenMethod) else None


def offered(model: nn.Module, plan: Plan) -> tuple[Site, ...]:
    """The model's own places for the tokens of a plan; none for a method that cuts weights.

    Raises:
        PlanError: the model has no place for them.
    """
    method = method_of(plan)
    return () if method is None else token_sites(model, method.kinds)


def carrier_of(model: nn.Module, plan: Plan) -> str | None:
    """The name of the module that wears the plan's parameters: the word embeddings of where it works."""
    method = method_of(plan)
    if method is None:
        return None
    place = body(model)
    if Kind.TOKENS in method.kinds:
        return place.embedding
    below = embedding_below(model, place.trunk)
    return f"{place.trunk}.{below}" if place.trunk else below


def fresh(
    model: nn.Module, plan: Plan, generator: torch.Generator | None, ids: Sequence[int], blank: bool
) -> dict[str, Tensor]:
    """Fresh parameters of the plan's method; with `blank`, their shapes on the meta device.

    Args:
        ids: the token ids of the method's `start_text`.
    """
    method = method_of(plan)
    if method is None:
        return {}
    if blank:
        shapes = method.shared_shapes(plan.sites)
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    table = model.get_submodule(body(model).embedding).weight if method.needs_vocabulary else None
    vocabulary = table if isinstance(table, Tensor) and not table.is_meta else None
    return method.init_shared(plan.sites, generator, vocabulary, ids)


def operation(
    model: nn.Module, adapter: Adapter, bases: Mapping[str, nn.Module], trainable: bool, reading: Reading
) -> tuple[dict[str, Graft], str, tuple[tuple[str, Hook], ...]]:
    """The grafts by name, the name of their carrier and the hooks that put the adapter on the model.

    Args:
        bases: what stands at each name, replaced heads included.
        reading: how the model reads the tokens.

    Raises:
        PlanError: there is a prefix on the model already, or no room for so many tokens.
    """
    place, method, at = body(model), method_of(adapter.plan), carrier_of(model, adapter.plan)
    assert method is not None and at is not None
    _check_room(model, method)
    carrier = TokenGraft(bases[at], adapter.name, _theta(bases[at], adapter, method, trainable), reading)
    grafts: dict[str, Graft] = {at: carrier}
    if Kind.TOKENS in method.kinds:
        count = method.num_virtual_tokens
        hooks = prompts.hooks(model, place, adapter.name, count, reading)
        return grafts | prompts.grafts(model, bases, adapter.name, count, reading), at, hooks
    _check_single(model)
    heads = adapter.plan.sites[0].shape
    if place.family is Family.ENCODER:
        for layer, site in enumerate(adapter.plan.sites):
            base = bases[site.name]
            grafts[site.name] = PrefixGraft(base, adapter.name, layer, carrier, (heads[0], heads[1]))
    return grafts, at, prefixes.hooks(model, place, adapter.name, heads, reading)


def taken(carrier: nn.Module, name: str) -> dict[str, Tensor]:
    """The parameters of one adapter at its carrier."""
    while isinstance(carrier, Graft):
        if isinstance(carrier, TokenGraft) and carrier.label == name:
            return {key: p.detach() for key, p in carrier.theta.params().items()}
        carrier = carrier.base
    raise PlanError(f"The word embeddings were replaced while the adapter {name!r} was on them; it is lost.")


def named(model: nn.Module) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """The parameters that hold virtual tokens, by their names in the model, and the tokens by name.

    A prompt is `prompt`, (n, width); a prefix is `prefix.<layer>.key` and `.value`, (heads, n, head_dim).
    """
    tables: list[str] = []
    tokens: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, TokenGraft) and module.active:
            tables += [f"{name}.{module.label}.{parameter}" for parameter in module.theta.params()]
            tokens.update(_tokens(model, module))
    return tuple(tables), tokens


def cached(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """What a prefix puts into the cache of every layer: keys and values, each (heads, n, head_dim).

    Empty without a prefix, and for encoders, which keep no cache.
    """
    for carrier in carriers(model):
        site, family = _site(model, carrier), body(model).family
        if site.kind is Kind.ATTENTION and family is not Family.ENCODER:
            with torch.no_grad():
                entries = carrier.keys_and_values(site.shape[1], site.shape[0])
            return prefixes.by_layer(entries, family is Family.ENCODER_DECODER)
    return []


def count(model: nn.Module) -> int:
    """How many positions the virtual tokens on the model take."""
    working = carriers(model)
    return sum(m.method.num_virtual_tokens for m in working if m.reading.position_shift)


def _tokens(model: nn.Module, carrier: TokenGraft) -> dict[str, Tensor]:
    site = _site(model, carrier)
    with torch.no_grad():
        if site.kind is not Kind.ATTENTION:
            return {"prompt": carrier.tokens()[: carrier.method.num_virtual_tokens]}
        entries = carrier.keys_and_values(site.shape[1], site.shape[0])
    words = ("key", "value")
    return {f"prefix.{i // 2}.{words[i % 2]}": entry for i, entry in enumerate(entries)}


def _site(model: nn.Module, carrier: TokenGraft) -> Site:
    return next(record for record in chart(model).records if record.name == carrier.label).plan.sites[0]


def _theta(base: nn.Module, adapter: Adapter, method: TokenMethod, trainable: bool) -> Theta:
    weight = base.weight
    assert isinstance(weight, Tensor)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    params = {name: p.to(weight.device, dtype) for name, p in adapter.shared.items()}
    return Theta(method, params, 0.0, trainable and method.trainable)


def _check_room(model: nn.Module, method: TokenMethod) -> None:
    place, count = body(model), method.num_virtual_tokens
    entered = place.memory if Kind.TOKENS in method.kinds else place.trunk
    limit = position_limit(model.get_submodule(entered))
    if limit is not None and count >= limit:
        raise PlanError(
            f"{count} virtual tokens leave no room for words: {type(model).__name__} has {limit} positions. "
            f"Take fewer, e.g. `num_virtual_tokens={max(1, limit // 8)}`; nothing was changed."
        )


def _check_single(model: nn.Module) -> None:
    other = next(
        (r for r in chart(model).records if r.carrier and r.plan.sites[0].kind is Kind.ATTENTION), None
    )
    if other is not None:
        raise PlanError(
            f"{type(model).__name__} has the prefix {other.name!r} already, and a model takes one at a time. "
            f"Remove it first (`remove(model, {other.name!r})`); nothing was changed."
        )


__all__ = [
    "cached",
    "carrier_of",
    "count",
    "fresh",
    "method_of",
    "named",
    "offered",
    "operation",
    "plan",
    "taken",
]
