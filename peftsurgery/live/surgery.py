"""Inject and remove: both are one `swap`, and everything that can fail is done before it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from peftsurgery.adapter import Adapter, check, rebased
from peftsurgery.errors import AlreadyGrafted, MismatchedTensors, PlanError, UnclaimedSites, listing, nearest
from peftsurgery.live import outputs, soft
from peftsurgery.live.anatomy import model_type
from peftsurgery.live.chart import Record, chart, enter, leave, record
from peftsurgery.live.grafts import Graft, StandIn, Theta, WeightGraft
from peftsurgery.live.sites import everywhere, sites, walk
from peftsurgery.live.swap import Hook, hook, require_grad, swap, unhook
from peftsurgery.method import WeightMethod
from peftsurgery.pause import collector_paused
from peftsurgery.planning import Plan, Step
from peftsurgery.reading import AS_PEFT, Reading
from peftsurgery.site import Kind, Site

Replaced = Mapping[str, Mapping[str, Tensor]]
"""Module name → parameter name → the value that the adapter brings for it."""


@collector_paused()
def fresh(
    model: nn.Module,
    plan: Plan,
    name: str = "default",
    seed: int | None = None,
    task_type: str | None = None,
    *,
    ids: Sequence[int] = (),
    real: bool = False,
) -> Adapter:
    """A new adapter for `plan`: initialised parameters, and copies of the heads and biases that will train.

    Args:
        seed: makes the parameters reproducible.
        ids: the token ids of the text that virtual tokens start from.
        real: give parameters memory and values even where the model is on the meta device.

    Raises:
        NoSiteMatched: a head of `plan.modules_to_save` that the model lacks.
    """
    modules = dict(walk(model))
    meta = not real and next(model.parameters()).is_meta
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    params = {s.site.name: _blank(s) if meta else s.method.init(s.site, None, generator) for s in plan.steps}
    shared = soft.fresh(model, plan, generator, ids, meta)
    base = getattr(getattr(model, "config", None), "name_or_path", None) or None
    return Adapter(plan, params, name, shared, _copies(modules, plan), task_type, base, model_type(model))


def inject(
    model: nn.Module, adapter: Adapter, *, trainable: bool = True, reading: Reading = AS_PEFT
) -> nn.Module:
    """Put `adapter` on the model: its sites grafted, its heads and biases in force, the base frozen.

    Args:
        trainable: whether the adapter's own parameters require gradients.
        reading: how the model reads virtual tokens, where it is not as they were trained to be.

    Raises:
        AlreadyGrafted: an adapter of that name is on the model.
        PlanError: the model cannot be read so.
        UnclaimedSites, MismatchedTensors, NonFiniteWeight: the adapter does not fit; nothing was changed.
    """
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)} if adapter.replaced else ()
    own, _ = rebased(check(adapter), [*sites(model), *_special(model, adapter.plan)], names)
    copied = {site: {name: p.clone() for name, p in params.items()} for site, params in own.params.items()}
    shared = {name: p.clone() for name, p in own.shared.items()}
    return graft(model, replace(own, params=copied, shared=shared), trainable=trainable, reading=reading)


@collector_paused()
def graft(
    model: nn.Module, adapter: Adapter, *, trainable: bool = True, reading: Reading = AS_PEFT
) -> nn.Module:
    """`inject` for an adapter that was made for this very model (`fresh`), whose tensors it takes over.

    Raises:
        AlreadyGrafted: an adapter of that name is on the model.
    """
    walked = list(walk(model))
    modules = dict(walked)
    _check_name(model, adapter, modules)
    replaced = _by_module(adapter, modules)
    way = adapter.reading if reading == AS_PEFT else reading
    grafts, carrier, hooks = _grafts(model, adapter, replaced, modules, trainable, way)
    base = (
        {} if chart(model).records else {name: p for name, p in model.named_parameters() if p.requires_grad}
    )
    leaves = tuple((module, tuple(values)) for module, values in replaced.items())
    new = Record(
        *(adapter.name, adapter.plan, tuple(grafts), leaves, adapter.task_type, adapter.base),
        *(carrier, hooks, way),
    )
    old = swap(model, everywhere(grafts, walked))
    try:
        hook(model, hooks)
        require_grad(base.values(), False)
        enter(model, new, tuple(base))
    except BaseException:
        swap(model, old)
        unhook(model, hooks)
        require_grad(base.values(), True)
        raise
    return model


def remove(model: nn.Module, name: str) -> Adapter:
    """Take an adapter off the model, which is then what it was, bit for bit; returns what was taken out.

    Raises:
        PlanError: the model has no adapter of that name.
    """
    adapter, walked = taken(model, name), list(walk(model))
    modules = dict(walked)
    bare, inner = {}, []
    for place in record(model, name).places:
        bare[place], cuts = _without(modules[place], name)
        inner += cuts
    swap(model, everywhere(bare, walked))
    for worn, below in inner:
        swap(worn, {"base": below})
    unhook(model, record(model, name).hooks)
    thaw = set(leave(model, name))
    require_grad((p for full, p in model.named_parameters() if full in thaw), True)
    return adapter


def taken(model: nn.Module, name: str) -> Adapter:
    """The adapter of that name as a value, the model untouched; its tensors are the model's own.

    Raises:
        PlanError: the model has no adapter of that name.
    """
    entry, modules = record(model, name), dict(walk(model))
    layers = {place: list(_layers(modules[place], name)) for place in entry.places}
    found = {**outputs.thetas(layers), **_weights(layers)}
    steps: list[Step] = []
    params: dict[str, Mapping[str, Tensor]] = {}
    shared = {} if entry.carrier is None else soft.taken(modules[entry.carrier], name)
    for step in entry.plan.steps:
        if entry.carrier is not None:
            steps.append(step)
            params[step.site.name] = {}
            continue
        theta = found[step.site.name]
        steps.append(Step(step.site, theta.method))
        params[step.site.name] = {key: p.detach() for key, p in theta.params().items()}
    replaced = {}
    for place, leaves in entry.replaces:
        own = next(g for g in layers[place] if isinstance(g, StandIn)).own
        replaced.update({f"{place}.{leaf}": own.get_parameter(leaf).detach() for leaf in leaves})
    plan = replace(entry.plan, steps=tuple(steps))
    origin = (entry.task_type, entry.base, model_type(model), entry.reading)
    return Adapter(plan, params, name, shared, replaced, *origin)


def _special(model: nn.Module, plan: Plan) -> tuple[Site, ...]:
    """The places of a plan that are no modules with a weight."""
    return *soft.offered(model, plan), *outputs.offered(model, plan)


def _weights(layers: Mapping[str, Sequence[Graft]]) -> dict[str, Theta]:
    grafts = ((place, graft) for place, worn in layers.items() for graft in worn)
    return {place: graft.theta for place, graft in grafts if isinstance(graft, WeightGraft)}


def _blank(step: Step) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in step.method.shapes(step.site).items()}


def _layers(module: nn.Module, name: str) -> Iterable[Graft]:
    """The grafts of one adapter on one module, the outermost first."""
    while isinstance(module, Graft):
        if module.label == name:
            yield module
        module = module.base


def _without(module: nn.Module, name: str) -> tuple[nn.Module, list[tuple[Graft, nn.Module]]]:
    """The module without the grafts of one adapter, and what the grafts of others must then stand on."""
    if not isinstance(module, Graft):
        return module, []
    below, cuts = _without(module.base, name)
    if module.label == name:
        return below, cuts
    return module, cuts if below is module.base else [*cuts, (module, below)]


def _check_name(model: nn.Module, adapter: Adapter, modules: Mapping[str, nn.Module]) -> None:
    name = adapter.name
    if any(record.name == name for record in chart(model).records):
        raise AlreadyGrafted(
            f"{type(model).__name__} already has an adapter {name!r}. Give this one another name "
            f"(`name={name + '_2'!r}`) or remove the other first; nothing was changed.",
            name=name,
        )
    carried = (place for place in [soft.carrier_of(model, adapter.plan)] if place is not None)
    places = [*carried, *outputs.layers(model, adapter.plan), *_modules_of(adapter.plan)]
    bare = {type(modules[place]): modules[place] for place in places}
    taken = any(hasattr(module, name) for module in bare.values())
    if taken or name == "base" or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise PlanError(
            f"{name!r} cannot name an adapter: letters, digits, `_` and `-` can, except the names that a module has "
            "already. Try `name='adapter'`; nothing was changed."
        )


def _modules_of(plan: Plan) -> list[str]:
    return [site.name for site in plan.sites if site.kind is not Kind.OUTPUT]


def _copies(modules: Mapping[str, nn.Module], plan: Plan) -> dict[str, Tensor]:
    """Copies of what will train beside the method: whole heads, and biases by the plan's bias mode."""
    heads = {name: leaf for name, leaf in _parameters(modules) if _in_head(name, plan.modules_to_save)}
    wanted = {"none": set[str](), "lora_only": {site.bias for site in plan.sites}}.get(plan.bias)
    biases = {
        n: p for n, p in _parameters(modules) if n.endswith(".bias") and (wanted is None or n in wanted)
    }
    return {name: p.detach().clone() for name, p in {**heads, **biases}.items()}


def _parameters(modules: Mapping[str, nn.Module]) -> Iterable[tuple[str, nn.Parameter]]:
    for name, module in modules.items():
        root = module.root if isinstance(module, Graft) else module
        yield from ((f"{name}.{leaf}", p) for leaf, p in root._parameters.items() if p is not None)


def _in_head(name: str, heads: Iterable[str]) -> bool:
    return any(f".{head}." in f".{name}" for head in heads)


def _by_module(adapter: Adapter, modules: Mapping[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    values: dict[str, dict[str, Tensor]] = defaultdict(dict)
    known = dict(_parameters(modules))
    for name, value in adapter.replaced.items():
        if name not in known:
            raise UnclaimedSites(
                f"The adapter replaces {name!r}, which the model has not got. Nearest: "
                f"{listing(nearest(name, known)) or 'nothing'}. Load the model with the adapter's task"
                f"{f' ({adapter.task_type})' if adapter.task_type else ''}; nothing was changed.",
                sites=[name],
                nearest=nearest(name, known),
            )
        if known[name].shape != value.shape:
            raise MismatchedTensors(
                f"The adapter's {name!r} has shape {tuple(value.shape)} and the model's {tuple(known[name].shape)}. "
                f"Load the model with as many labels (`num_labels={value.shape[0]}`); nothing was changed.",
                unexpected=[name],
            )
        place, _, leaf = name.rpartition(".")
        values[place][leaf] = value.to(known[name], copy=True)
    return dict(values)


def _grafts(
    model: nn.Module,
    adapter: Adapter,
    replaced: Replaced,
    modules: Mapping[str, nn.Module],
    trainable: bool,
    reading: Reading,
) -> tuple[dict[str, Graft], str | None, tuple[tuple[str, Hook], ...]]:
    """The new grafts by name and, for virtual tokens, the name of their carrier and their hooks."""
    grafts: dict[str, Graft] = {}
    for place, values in replaced.items():
        grafts[place] = StandIn(modules[place], adapter.name, values, trainable)
    if soft.method_of(adapter.plan) is not None:
        own, carrier, hooks = soft.operation(model, adapter, {**modules, **grafts}, trainable, reading)
        return grafts | own, carrier, hooks
    if reading != AS_PEFT:
        raise PlanError(
            f"`reading` is for virtual tokens, and {adapter.name!r} has none. Leave it out; nothing was changed."
        )
    for step in adapter.plan.steps:
        place = step.site.name
        if step.site.kind is not Kind.OUTPUT:
            grafts[place] = _weight_graft(grafts.get(place, modules[place]), step, adapter, trainable)
    return grafts | outputs.grafts(model, adapter, modules, trainable), None, ()


def _weight_graft(base: nn.Module, step: Step, adapter: Adapter, trainable: bool) -> WeightGraft:
    method = step.method
    assert isinstance(method, WeightMethod)
    weight = base.weight
    assert isinstance(weight, Tensor)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    params = {k: p.to(weight.device, dtype) for k, p in adapter.params[step.site.name].items()}
    return WeightGraft(base, step.site, adapter.name, Theta(method, params, method.dropout, trainable))
