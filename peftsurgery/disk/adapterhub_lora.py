"""AdapterHub's LoRA: `LoRAConfig`, and keys `<site>.loras.<name>.lora_A` and `.lora_B`.

Where a model computes query, key and value with one map (GPT-2), AdapterHub's file has one pair of factors for each
that `attn_matrices` names, all A below one another and all B too. That is a LoRA like any other: one whose B is
zero outside its blocks, or, where the blocks have one A in common, one of the plain rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
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
from peftsurgery.disk.adapterhub_places import check_even, left_out, stacks
from peftsurgery.disk.peft_sites import natural
from peftsurgery.errors import AdapterError, MismatchedTensors, listing
from peftsurgery.method import Method, Params
from peftsurgery.planning import Plan, Step
from peftsurgery.site import Kind, Site

MARK = ".loras."
A, B = "lora_A", "lora_B"
MATRICES = ("q", "k", "v")
QKV = "qkv"
"""Our word for a map that computes query, key and value at once."""
PLACES = ("selfattn_lora", "intermediate_lora", "output_lora")
MODULES = (
    (r"c_attn|in_proj", QKV),
    (r"query|query_proj|q_proj|q_lin|q", "q"),
    (r"key|key_proj|k_proj|k_lin|k", "k"),
    (r"value|value_proj|v_proj|v_lin|v", "v"),
    (r"intermediate\.dense|lin1|fc1|c_fc|wi|wi_1|ffn|down_proj", PLACES[1]),
    (r"(?<!attention\.)output\.dense|lin2|fc2|mlp\.c_proj|wo|ffn_output|up_proj", PLACES[2]),
)
"""How the names of modules end that AdapterHub puts a LoRA at, and its words for them. (It calls a Llama's down_proj
intermediate and its up_proj output.)"""
KNOWN = {"architecture", *PLACES, "leave_out", "r", "alpha", "dropout", "attn_matrices", "init_weights"}
IDLE = {"init_weights_seed", "dtype", "composition_mode"}
FAULTY = (1, 1, 0)
"""The first version whose LoRA is scaled by alpha / r; the ones before trained with 1, whatever alpha said."""


def understood(said: Said, tensors: Mapping[str, Tensor], methods: Mapping[str, type[Method]]) -> Adapter:
    """The adapter that the words and the tensors make.

    Raises:
        UnknownMethod: an option that is not implemented: (IA)³, DoRA, VeRA, gates.
        MismatchedTensors: tensors are missing, unexpected, or at places that the words do not name.
        AdapterError, PlanError: a value of the wrong type or out of its range.
    """
    config = dict(said.config)
    plain = config if config.get("composition_mode", "add") != "add" else {**config, "composition_mode": None}
    refuse_options(plain, KNOWN | IDLE - ({"composition_mode"} if plain is config else set()))
    found = by_site(tensors, MARK, said)
    check_even(stacks(found), layers_left_out(config))
    method = methods["lora"](**_arguments(said, methods["lora"]))
    words = _matrices(config)
    steps, params = [], {}
    for name in sorted(found, key=natural):
        _check_word(name, config, words)
        own, pair = _unfused(name, method, words, _pair(name, found[name]))
        site = Site(name, Kind.LINEAR, (pair[1].shape[0], pair[0].shape[1]))
        steps.append(Step(site, own))
        params[name] = dict(zip(own.shapes(site), pair, strict=True))
    return said.adapter(Plan(tuple(steps)), params)


def written(adapter: Adapter) -> Written:
    """What AdapterHub reads of a LoRA.

    Raises:
        AdapterError: AdapterHub puts no LoRA at one of its sites, or cannot say how the sites differ.
    """
    steps = adapter.plan.steps
    common = asdict(steps[0].method)
    words = {step.site.name: _word(step.site.name) for step in steps}
    _check_sayable(steps, words)
    fused = {name for name, word in words.items() if word == QKV}
    layers = stacks(words)
    config: Config = {
        "architecture": "lora",
        **{place: place in words.values() for place in PLACES},
        PLACES[0]: any(word not in PLACES for word in words.values()),
        "attn_matrices": [m for m in MATRICES if m in words.values() or fused],
        "r": common["r"],
        "alpha": _alpha(steps[0].method),
        "dropout": float(common["lora_dropout"]),
        "composition_mode": "add",
        "init_weights": "lora",
        "leave_out": left_out(layers, is_whole=True, fills=True, model_type=adapter.model_type),
    }
    tensors = {name: _fused(adapter.params[name], name in fused) for name in words}
    return Written(config, keyed(tensors, MARK, adapter.name, adapter.model_type))


def _arguments(said: Said, kind: type[Method]) -> Config:
    config = said.config
    rank = config.get("r", 8)
    alpha = rank if _is_faulty(said.version) else config.get("alpha", 8)
    return arguments({"r": rank, "lora_alpha": alpha, "lora_dropout": config.get("dropout", 0.0)}, kind)


def _is_faulty(version: str | None) -> bool:
    found = re.match(r"adapters\.([0-9]+)\.([0-9]+)\.([0-9]+)", version or "")
    return found is not None and tuple(map(int, found.groups())) < FAULTY


def _matrices(config: Mapping[str, Any]) -> list[str]:
    value = config.get("attn_matrices", ["q", "v"])
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise AdapterError(f"`attn_matrices` is {repr(value)[:60]}. It is a list of 'q', 'k' and 'v'.")
    return [word for word in MATRICES if word in value]


def _word(name: str) -> str | None:
    """AdapterHub's word for the module of that name; None where it puts no LoRA."""
    return next((w for end, w in MODULES if re.search(rf"(?:^|\.)(?:{end})$", name)), None)


def _check_word(name: str, config: Mapping[str, Any], matrices: Sequence[str]) -> None:
    word = _word(name)
    named = word is not None and (
        bool(config.get(word))
        if word in PLACES
        else bool(config.get(PLACES[0], True) and (word in matrices or (word == QKV and matrices)))
    )
    if not named:
        raise MismatchedTensors(
            f"The file holds a LoRA at {name!r}, which its configuration does not name. The two files are not of "
            "one adapter.",
            unexpected=[name],
        )


def _pair(name: str, params: Params) -> tuple[Tensor, Tensor]:
    missing, strange = sorted({A, B} - params.keys()), sorted(params.keys() - {A, B})
    if missing or strange or any(t.ndim != 2 for t in params.values()):
        raise MismatchedTensors(
            f"A LoRA has the matrices {A} and {B}, and the file has {listing(sorted(params))} at {name!r}. Save or "
            "download the adapter again.",
            missing=[f"{name}.{word}" for word in missing],
            unexpected=[f"{name}.{word}" for word in strange],
        )
    return params[A], params[B]


def _unfused(
    name: str, method: Method, words: Sequence[str], pair: tuple[Tensor, Tensor]
) -> tuple[Method, tuple[Tensor, Tensor]]:
    """The LoRA of a map that computes query, key and value at once; another one as it is."""
    if _word(name) != QKV:
        return method, pair
    a, b = pair
    said, count = asdict(method), len(words)
    if a.shape[0] != count * said["r"] or b.shape[0] % count:
        raise MismatchedTensors(
            f"{name!r} has factors of {tuple(a.shape)} and {tuple(b.shape)}, and the configuration announces rank "
            f"{said['r']} for each of {listing(words)}. The two files are not of one adapter.",
            unexpected=[f"{name}.{A}"],
        )
    above, below = a.chunk(count), b.chunk(count)
    if count == len(MATRICES) and all(torch.equal(block, above[0]) for block in above):
        return method, (above[0].clone(), b)
    rows, rank = below[0].shape[0], said["r"]
    whole = b.new_zeros(rows * len(MATRICES), rank * count)
    for index, (word, block) in enumerate(zip(words, below, strict=True)):
        first = MATRICES.index(word) * rows
        whole[first : first + rows, index * rank : (index + 1) * rank] = block
    return _wider(method, count), (a, whole)


def _wider(method: Method, count: int) -> Method:
    """The LoRA of `count` times the rank and the same scale."""
    said = asdict(method)
    more: dict[str, Any] = {"r": said["r"] * count, "lora_alpha": said["lora_alpha"] * count}
    return replace(method, **more)


def _fused(params: Params, is_fused: bool) -> dict[str, Tensor]:
    a, b = (params[f"{word}.weight"] for word in (A, B))
    return {A: torch.cat([a] * len(MATRICES)) if is_fused else a, B: b}


def _alpha(method: Method) -> float:
    said = asdict(method)
    alpha = said["lora_alpha"] * (said["r"] ** 0.5 if said["use_rslora"] else 1)
    return int(alpha) if float(alpha).is_integer() else float(alpha)


def _check_sayable(steps: Sequence[Step], words: Mapping[str, str | None]) -> None:
    lost = [name for name, word in words.items() if word is None]
    if lost or any(step.site.kind is not Kind.LINEAR for step in steps):
        raise AdapterError(
            f"AdapterHub puts a LoRA at query, key and value and at the feed-forward's two maps, and this one is at "
            f"{listing(lost or [s.site.name for s in steps])} too. Train it at those alone, or keep PEFT's format."
        )
    odd = next((step for step in steps if step.method != steps[0].method), None)
    if odd is not None or asdict(steps[0].method)["lora_bias"]:
        raise AdapterError(
            f"{(odd or steps[0]).site.name!r} has {(odd or steps[0]).method}, and AdapterHub's LoRA has one rank and "
            "one alpha for all places and no bias of its own. Keep PEFT's format."
        )
