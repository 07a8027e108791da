"""AdapterHub's prefix tuning: one group of keys and values, and a copy of it below every layer.

A flat prefix is PEFT's table as one row of numbers; a projected one is PEFT's encoder under other names. What differs
is how it is read: AdapterHub numbers the words of the input from 0, PEFT from n on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from math import prod

import torch
from torch import Tensor

from peftsurgery.adapter import Adapter
from peftsurgery.disk.adapterhub_config import Config, Said, Written, arguments, refuse_options
from peftsurgery.disk.adapterhub_keys import ordered
from peftsurgery.disk.adapterhub_models import naming, ours
from peftsurgery.disk.peft_sites import natural
from peftsurgery.errors import AdapterError, MismatchedTensors, UnknownMethod, listing
from peftsurgery.method import TABLE, Method
from peftsurgery.planning import Plan, Step
from peftsurgery.reading import Reading
from peftsurgery.site import Kind, Site

GROUP = "self_prefix"
SHORT = {"distilbert": "self"}
"""What the group is called elsewhere."""
FLAT = "control_trans"
ENCODER = {
    "wte.weight": "embedding.weight",
    "control_trans.0.weight": "transform.0.weight",
    "control_trans.0.bias": "transform.0.bias",
    "control_trans.2.weight": "transform.2.weight",
    "control_trans.2.bias": "transform.2.bias",
}
"""The parameters of a projected prefix: AdapterHub's names and PEFT's."""
SHIFT = "position_shift"
"""A word that is not AdapterHub's, and that its library passes over: the words of the input are numbered from n on."""
KNOWN = {"architecture", "flat", "prefix_length", "bottleneck_size", "non_linearity", "dropout", SHIFT}
IDLE = {"encoder_prefix", "cross_prefix", "shared_gating", "init_weights_seed"}


def understood(said: Said, tensors: Mapping[str, Tensor], methods: Mapping[str, type[Method]]) -> Adapter:
    """The prefix that the words and the tensors make.

    Raises:
        UnknownMethod: an option that is not implemented, or a prefix of an encoder-decoder.
        MismatchedTensors: tensors are missing, unexpected or misshapen.
        AdapterError, PlanError: a value of the wrong type or out of its range.
    """
    config, kind = said.config, methods["prefix-tuning"]
    refuse_options(config, KNOWN | IDLE)
    if not config.get("flat") and config.get("non_linearity", "tanh") != "tanh":
        raise UnknownMethod(
            f"The prefix is made with {config['non_linearity']!r}, and peftsurgery computes tanh alone. Flatten it in "
            "AdapterHub's library first (`model.eject_prefix_tuning(name)`)."
        )
    params, attentions = _collected(said, tensors)
    count = config.get("prefix_length", 30)
    own = {"num_virtual_tokens": count, "prefix_projection": not config.get("flat")}
    if not config.get("flat"):
        own["encoder_hidden_size"] = config.get("bottleneck_size", 512)
    method = kind(**arguments(own, kind))
    shared = _flat(params, count) if config.get("flat") else _projected(params)
    sites = _sites(
        said, attentions, shared[TABLE].shape[1] if TABLE in shared else len(shared["transform.2.bias"])
    )
    plan = Plan(tuple(Step(site, method) for site in sites))
    reading = Reading(position_shift=bool(config.get(SHIFT)))
    return said.adapter(plan, {site.name: {} for site in sites}, shared, reading)


def written(adapter: Adapter) -> Written:
    """What AdapterHub reads of a prefix."""
    method, sites = asdict(adapter.plan.steps[0].method), adapter.plan.sites
    flat = not method["prefix_projection"]
    config: Config = {
        "architecture": "prefix_tuning",
        "flat": flat,
        "prefix_length": method["num_virtual_tokens"],
        **({} if flat else {"bottleneck_size": method["encoder_hidden_size"] or prod(sites[0].shape)}),
        "non_linearity": "tanh",
        "dropout": 0.0,
        "leave_out": [],
        **({SHIFT: True} if adapter.reading.position_shift else {}),
    }
    back = {mine: theirs for theirs, mine in ENCODER.items()}
    tensors = (
        {FLAT: adapter.shared[TABLE].reshape(-1)}
        if flat
        else {back[name]: tensor for name, tensor in adapter.shared.items()}
    )
    head, group = naming(adapter.model_type).prefix, SHORT.get(adapter.model_type or "", GROUP)
    at = f"{head}.prefix_tuning" if head else "prefix_tuning"
    keys = [
        (f"{at}.prefix_tunings.{adapter.name}.{group}.{word}", tensor) for word, tensor in tensors.items()
    ]
    return Written(config, ordered(keys), {"num_layers": len(sites)})


def _collected(said: Said, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The group's parameters, and the names of the attention layers that have a copy."""
    form = re.compile(
        rf"(?:(?P<at>.+)\.)?prefix_tuning\.(?P<pool>pool\.)?prefix_tunings\.{re.escape(said.name)}\.(?P<group>\w+)\.(?P<word>.+)"
    )
    params: dict[str, Tensor] = {}
    layers: dict[str, None] = {}
    strange, others = [], set()
    for key in sorted(tensors, key=natural):
        parts, tensor = form.fullmatch(key), tensors[key]
        if parts is None or not tensor.is_floating_point():
            strange.append(key)
            continue
        if parts["pool"]:
            layers[ours(parts["at"] or "", said.model_type)] = None
        if parts["group"] not in (GROUP, *SHORT.values()):
            others.add(parts["group"])
        elif not torch.equal(params.setdefault(parts["word"], tensor), tensor):
            strange.append(key)
    if others:
        raise UnknownMethod(
            f"The prefix has the groups {listing(sorted(others))}: it is an encoder-decoder's, whose keys and values "
            "no other library reads so. Use AdapterHub's library for it."
        )
    if strange:
        raise MismatchedTensors(
            f"The file holds {listing(strange)}, which is no tensor of the prefix {said.name!r}, or not equal to its "
            "copies. Save or download the adapter again.",
            unexpected=strange,
        )
    return params, list(layers)


def _flat(params: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    _check_words(params, {FLAT})
    if params[FLAT].ndim != 1 or params[FLAT].numel() % count:
        raise MismatchedTensors(
            f"{FLAT!r} has shape {tuple(params[FLAT].shape)}, which {count} tokens cannot share evenly. The two files "
            "are not of one adapter.",
            unexpected=[FLAT],
        )
    return {TABLE: params[FLAT].reshape(count, -1)}


def _projected(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    _check_words(params, set(ENCODER))
    return {mine: params[theirs] for theirs, mine in ENCODER.items()}


def _check_words(params: Mapping[str, Tensor], wanted: set[str]) -> None:
    if params.keys() != wanted:
        raise MismatchedTensors(
            f"The prefix has {listing(sorted(params)) or 'no tensor'}, and its configuration announces "
            f"{listing(sorted(wanted), 5)}. The two files are not of one adapter.",
            missing=sorted(wanted - params.keys()),
            unexpected=sorted(params.keys() - wanted),
        )


def _sites(said: Said, attentions: list[str], numbers: int) -> list[Site]:
    """The attention layers; how many heads they have, the files do not say."""
    count = len(attentions) or said.layers or (numbers // (2 * said.hidden_size) if said.hidden_size else 0)
    if not count or numbers % (2 * count):
        raise AdapterError(
            f"The prefix has {numbers} numbers for a token, which {count} layers cannot share evenly. The "
            "configuration is damaged: save or download the adapter again."
        )
    names = attentions or [f"layers.{layer}.attention" for layer in range(count)]
    return [Site(name, Kind.ATTENTION, (1, numbers // (2 * count))) for name in names]
