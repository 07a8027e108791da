"""AdapterHub's bottleneck adapters: `BnConfig`, and keys `<site>.adapters.<name>.<parameter>`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from math import nextafter
from typing import Any

import torch
from torch import Tensor

from peftsurgery.adapter import Adapter
from peftsurgery.disk.adapterhub_config import (
    Config,
    Said,
    Written,
    arguments,
    layers_left_out,
    refuse_options,
)
from peftsurgery.disk.adapterhub_keys import by_site, keyed
from peftsurgery.disk.adapterhub_places import ROLES, Stacks, check_even, layer_number, left_out, role, stacks
from peftsurgery.disk.peft_sites import natural
from peftsurgery.errors import AdapterError, MismatchedTensors, listing
from peftsurgery.method import Method, Params
from peftsurgery.planning import Plan, Step
from peftsurgery.select import Query
from peftsurgery.site import Kind, Site

MARK = ".adapters."
FACTOR, SIZE = "reduction_factor", "bottleneck_size"
IDLE = {
    *("init_weights_seed", "inv_adapter_reduction_factor"),
    *("phm_dim", "factorized_phm_W", "shared_W_phm", "shared_phm_rule", "factorized_phm_rule", "phm_c_init"),
    *("phm_init_range", "learn_phm", "hypercomplex_nonlinearity", "phm_rank", "phm_bias"),
}
"""Words that mean nothing without `phm_layer` or `inv_adapter`, or in a trained adapter."""
SWAPPED = ".albert_layers."
EARLIER = {"gelu": "gelu_new", "gelu_orig": "gelu"}
"""What files without a version called the non-linearities."""
LEGACY = {
    f"{place}_text_{kind}_adapters": "adapters"
    for place in ("attention", "layer")
    for kind in ("task", "lang")
}
"""What the oldest files have in keys in the place of `adapters`."""


def understood(said: Said, tensors: Mapping[str, Tensor], methods: Mapping[str, type[Method]]) -> Adapter:
    """The adapter that the words and the tensors make.

    Raises:
        UnknownMethod: an option that is not implemented.
        MismatchedTensors: tensors are missing, unexpected, or at places that the words do not name.
        AdapterError, PlanError: a value of the wrong type or out of its range.
    """
    kind = methods["bottleneck"]
    refuse_options(said.config, {f.name for f in fields(kind)} | {*ROLES, "leave_out"} | IDLE)
    found = by_site({_today(key): tensor for key, tensor in tensors.items()}, MARK, said)
    check_order(found)
    layers = stacks(found)
    check_even(layers, layers_left_out(said.config))
    steps, params = [], {}
    words = _words(said)
    for name in sorted(found, key=natural):
        method = kind(**arguments({**words, FACTOR: _factor(words, layer_number(layers, name))}, kind))
        params[name] = without_twins(name, method, found[name])
        site = Site(name, Kind.OUTPUT, (_width(said, name, params[name]),), role=_role(layers, name))
        steps.append(Step(site, method))
    _check_roles(said, steps)
    return said.adapter(Plan(tuple(steps), _query(steps, layers, said)), params)


def written(adapter: Adapter) -> Written:
    """What AdapterHub reads of a bottleneck adapter.

    Raises:
        AdapterError: its configuration cannot say where the adapter is, or how its sites differ.
    """
    steps = adapter.plan.steps
    check_order(step.site.name for step in steps)
    layers = stacks(step.site.name for step in steps)
    tensors = {s.site.name: with_twins(s.method, adapter.params[s.site.name]) for s in steps}
    return Written(said_of(adapter, layers), keyed(tensors, MARK, adapter.name, adapter.model_type))


def said_of(adapter: Adapter, layers: Stacks) -> Config:
    """`BnConfig` as AdapterHub writes it, without what is as it is by default."""
    steps = adapter.plan.steps
    method = Counter(replace_size(step.method) for step in steps).most_common(1)[0][0]
    strange = next((step for step in steps if replace_size(step.method) != method), None)
    if strange is not None:
        raise AdapterError(
            f"{strange.site.name!r} has {strange.method} and others {method}; in AdapterHub's format only the "
            "reduction factor varies from layer to layer. Save them as two adapters."
        )
    roles = {_role(layers, step.site.name) for step in steps}
    words = {key: value for key, value in asdict(method).items() if key != SIZE}
    scaling = words["scaling"]
    return {
        **words,
        FACTOR: _factors(steps, layers),
        "scaling": scaling if isinstance(scaling, str) else float(scaling),
        "dropout": float(words["dropout"]),
        **{word: word in roles for word in ROLES},
        "leave_out": left_out(
            layers, is_whole=_is_whole(adapter.plan), fills=False, model_type=adapter.model_type
        ),
    }


def check_order(names: Iterable[str]) -> None:
    """Raise an AdapterError for places where AdapterHub hands its adapter the wrong way round what there is."""
    swapped = next((name for name in names if SWAPPED in name and name.endswith("attention_adapters")), None)
    if swapped is not None:
        raise AdapterError(
            f"{swapped!r} is behind ALBERT's attention, where adapters 1.3.0 takes the layer's input for the "
            "attention's output and the other way round; what is trained there means something else here. Leave "
            "it to the other library, or take `output_adapter` alone."
        )


def replace_size(method: Method) -> Method:
    """The method with the default size: what of it has to be alike at all sites."""
    defaults: dict[str, Any] = {f.name: f.default for f in fields(method) if f.name in (FACTOR, SIZE)}
    return replace(method, **defaults)


def without_twins(site: str, method: Method, params: Params) -> dict[str, Tensor]:
    """The parameters without those that the file holds twice.

    Raises:
        MismatchedTensors: the two are not equal.
    """
    for second, first in method.twins.items():
        if second in params and first in params and not torch.equal(params[second], params[first]):
            raise MismatchedTensors(
                f"The file holds {first!r} of {site!r} twice, with different values. Save the adapter again.",
                unexpected=[f"{site}.{second}"],
            )
    return {name: tensor for name, tensor in params.items() if name not in method.twins}


def with_twins(method: Method, params: Params) -> dict[str, Tensor]:
    """The parameters, and those once more that AdapterHub's files hold twice."""
    return {**params, **{second: params[first] for second, first in method.twins.items()}}


def _today(key: str) -> str:
    for old, new in LEGACY.items():
        key = key.replace(old, new)
    return key


def _words(said: Said) -> Config:
    words = dict(said.config)
    line = str(words.get("non_linearity", "")).lower()
    words["non_linearity"] = EARLIER.get(line, line) if said.version is None else line
    if type(words.get("scaling")) is int:
        words["scaling"] = float(words["scaling"])
    return words


def _factor(words: Mapping[str, Any], layer: int) -> Any:
    """The reduction factor of one layer."""
    factor = words.get(FACTOR)
    if not isinstance(factor, dict):
        return factor
    if str(layer) not in factor and "default" not in factor:
        raise AdapterError(f"`{FACTOR}` is {factor}, which says nothing of layer {layer}. Add a `default`.")
    return factor.get(str(layer), factor.get("default"))


def _factors(steps: Sequence[Step], layers: Stacks) -> Any:
    """One reduction factor, or one for each layer."""
    found: dict[int, set[float]] = {}
    for step in steps:
        found.setdefault(layer_number(layers, step.site.name), set()).add(_reduction(step))
    odd = next((layer for layer, factors in found.items() if len(factors) > 1), None)
    if odd is not None:
        raise AdapterError(
            f"The bottlenecks of layer {odd} have several sizes, and AdapterHub's format has one for each layer. "
            "Save them as two adapters."
        )
    by_layer = {layer: next(iter(factors)) for layer, factors in sorted(found.items())}
    default = Counter(by_layer.values()).most_common(1)[0][0]
    others = {str(layer): factor for layer, factor in by_layer.items() if factor != default}
    return {"default": default, **others} if others else default


def _reduction(step: Step) -> float:
    """d / m for AdapterHub, which takes the whole part of d / (d / m)."""
    said, width = asdict(step.method), step.site.shape[0]
    if said[SIZE] is None:
        return float(said[FACTOR])
    factor = width / said[SIZE]
    return factor if int(width // factor) == said[SIZE] else nextafter(factor, 0.0)


def _width(said: Said, name: str, params: Params) -> int:
    up = params.get("adapter_up.weight")
    if up is not None and up.ndim == 2:
        return up.shape[0]
    if said.hidden_size is None:
        raise MismatchedTensors(
            f"The file lacks {name + '.adapter_up.weight'!r}. Save or download the adapter again.",
            missing=[f"{name}.adapter_up.weight"],
        )
    return said.hidden_size


def _role(layers: Stacks, name: str) -> str:
    stack = next(stack for stack in layers if name.startswith(f"{stack}."))
    word = role(stack, name.removeprefix(f"{stack}.").partition(".")[2])
    if word is None:
        raise MismatchedTensors(
            f"{name!r} is no place that AdapterHub has bottlenecks at. Save the adapter again.",
            unexpected=[name],
        )
    return word


def _check_roles(said: Said, steps: Sequence[Step]) -> None:
    """The words name the places that are there; a cross-attention they may name where the model has none."""
    named = {word for word in ROLES if said.config.get(word)}
    found = {step.site.role for step in steps}
    missing = [word for word in ROLES[:2] if word in named - found]
    stray = [step.site.name for step in steps if step.site.role not in named]
    if missing or stray:
        raise MismatchedTensors(
            f"The configuration says {listing(sorted(named)) or 'no place'}, and the file's tensors are at "
            f"{listing(sorted(found)) or 'none'}. The two files are not of one adapter.",
            missing=missing,
            unexpected=stray,
        )


def _query(steps: Sequence[Step], layers: Stacks, said: Said) -> Query:
    """The words for the places; with the layers' numbers where some are left out."""
    words = [word for word in ROLES if any(step.site.role == word for step in steps)]
    numbers = sorted({number for stack in layers.values() for number in stack})
    return Query.of(words, layers_to_transform=numbers if said.config.get("leave_out") else None)


def _is_whole(plan: Plan) -> bool:
    """Whether the words that chose the sites take every layer of the model."""
    query = plan.query
    return query is not None and not (
        query.layers_to_transform or query.exclude_modules or set(query.targets) - set(ROLES)
    )
