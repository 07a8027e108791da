"""PEFT's tensor keys: `base_model.model.<site>.<parameter>`, and tensors that replace the base's whole."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from peftsurgery.adapter import Adapter
from peftsurgery.disk.peft_config import Config
from peftsurgery.disk.peft_sites import natural, probes, site_of
from peftsurgery.errors import MismatchedTensors, listing, nearest
from peftsurgery.lazy import outlined, renamed
from peftsurgery.method import Method
from peftsurgery.planning import Plan, Step, by_pattern
from peftsurgery.select import chosen, key_matches
from peftsurgery.site import Site

PREFIX = "base_model.model."
BASE = ".base_layer."
COPY = ".modules_to_save."
EMBEDDINGS = ("embed_tokens", "lm_head")
"""Modules that PEFT saves whole when the vocabulary was resized, without a word in the configuration."""


def understood(config: Config, tensors: Mapping[str, Tensor], name: str) -> Adapter:
    """The adapter that these tensors make under this configuration.

    Raises:
        MismatchedTensors: tensors are missing, unexpected or not selected by the configuration's words.
        PlanError: a pattern or a value that means nothing.
    """
    known = outlined(tensors)
    check_numbers(known)
    params, rest = _divided(known, config.method)
    sites = [
        site_of(site, config.method, config.layout, params[site]) for site in sorted(params, key=natural)
    ]
    whole = {key: tensors[key] for key in rest if _is_announced(key, config, params)}
    _check_keys(sites, config.method, known, whole)
    hits = _hits(sites, config)
    names = [site.name for site in sites]
    refine = by_pattern(sites, **{field: _used(keys, names) for field, keys in config.patterns.items()})
    steps = tuple(Step(site, refine(site, config.method)) for site in sites)
    return Adapter(
        Plan(steps, config.query, config.modules_to_save, config.bias, hits),
        {site.name: renamed(tensors, _keys(site, config.method)) for site in sites},
        name,
        replaced=replaced(whole, name),
        task_type=config.task_type,
        base=config.base,
    )


def _keys(site: Site, method: Method) -> dict[str, str]:
    """The method's parameters at a site → their keys."""
    return {word: f"{PREFIX}{site.name}.{word}" for word in method.shapes(site)}


def keyed(adapter: Adapter) -> list[tuple[str, Tensor]]:
    """The adapter's tensors under PEFT's keys, in safetensors' order: wide dtypes first, then by key."""
    sites = {site.name for site in adapter.plan.sites}
    found = [(f"{PREFIX}{_stored(name, sites)}", tensor) for name, tensor in adapter.replaced.items()]
    for site, params in adapter.params.items():
        found += [(f"{PREFIX}{site}.{word}", tensor) for word, tensor in params.items()]
    return sorted(found, key=lambda pair: (-pair[1].dtype.itemsize, pair[0]))


def heads(adapter: Adapter) -> tuple[str, ...]:
    """`modules_to_save` as the file needs it: the plan's, and the modules of whatever else is whole."""
    plan, sites = adapter.plan, {site.name for site in adapter.plan.sites}
    others = [name for name in adapter.replaced if not is_known(name, plan.modules_to_save, plan.bias, sites)]
    return tuple(dict.fromkeys([*plan.modules_to_save, *(name.rpartition(".")[0] for name in others)]))


def _stored(name: str, sites: Collection[str]) -> str:
    module, _, leaf = name.rpartition(".")
    return f"{module}{BASE}{leaf}" if module in sites else name


def plain_name(key: str, name: str = "default", prefix: str = PREFIX) -> str:
    """The name of a whole tensor in the model, without what PEFT's wrappers put into it."""
    full = key.removeprefix(prefix).replace(BASE, ".")
    return re.sub(rf"{re.escape(COPY)}(?:{re.escape(name)}\.|default\.)?", ".", full)


def _divided(
    tensors: Mapping[str, Tensor], method: Method
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The method's parameters by site, and all other tensors by key."""
    words = sorted({f".{word}" for probe in probes("", method) for word in method.shapes(probe)})
    params: dict[str, dict[str, Tensor]] = defaultdict(dict)
    rest = {}
    for key, tensor in tensors.items():
        word = next((word for word in words if key.endswith(word)), None)
        if word is None or not key.startswith(PREFIX):
            rest[key] = tensor
        else:
            params[key.removeprefix(PREFIX).removesuffix(word)][word[1:]] = tensor
    return dict(params), rest


def _is_announced(key: str, config: Config, sites: Collection[str]) -> bool:
    """Whether the configuration announces a whole tensor under this key."""
    name = plain_name(key)
    module, _, leaf = name.rpartition(".")
    inside = any(name.startswith(f"{site}.") for site in _above(module) if site in sites)
    if not key.startswith(PREFIX) or inside:
        return False
    based = BASE in key and module in sites and leaf in ("weight", "bias")
    return based or is_known(name, config.modules_to_save, config.bias, sites)


def _above(module: str) -> Iterable[str]:
    parts = module.split(".")
    return (".".join(parts[:depth]) for depth in range(1, len(parts)))


def is_known(name: str, modules_to_save: Iterable[str], bias: str, sites: Collection[str]) -> bool:
    """Whether PEFT reads a whole tensor of that name; `modules_to_save` holds mere ends of names."""
    module, _, leaf = name.rpartition(".")
    trained = leaf == "bias" and (bias == "all" or (bias == "lora_only" and module in sites))
    saved = leaf == "weight" and module.rpartition(".")[2] in EMBEDDINGS
    return trained or saved or any(f"{head}." in name for head in modules_to_save)


def replaced(whole: Mapping[str, Tensor], name: str, prefix: str = PREFIX) -> dict[str, Tensor]:
    """Whole tensors by their names in the model.

    With `bias="all"` PEFT writes a head's bias under several keys, and the untrained original too.
    """
    found: dict[str, Tensor] = {}
    for key in sorted(whole, key=natural):
        plain = plain_name(key, name, prefix)
        if ".original_module." in plain:
            continue
        if plain in found and not torch.equal(found[plain], whole[key]):
            raise MismatchedTensors(
                f"The adapter's file holds {plain!r} twice, with different values. Save the adapter again.",
                unexpected=[key],
            )
        found[plain] = whole[key]
    return found


def _used(keys: Mapping[str, object], names: Sequence[str]) -> dict[str, object]:
    """The patterns that mean a site of the file; PEFT leaves idle ones in its configuration."""
    return {key: value for key, value in keys.items() if any(key_matches(key, name) for name in names)}


def _hits(sites: Sequence[Site], config: Config) -> dict[str, int]:
    """How many sites each word of the configuration selects, when together they select all."""
    if config.query is None:
        return {}
    selection = chosen(sites, config.query)
    selected = set(selection.sites)
    stray = [site.name for site in sites if site not in selected]
    if stray and not config.twins:
        raise MismatchedTensors(
            f"The adapter's file holds tensors for {listing(stray)}, which the words of its configuration "
            f"({listing(tuple(selection.hits))}) do not select. The two files are not of one adapter.",
            unexpected=stray,
        )
    return {word: len(names) for word, names in selection.hits.items()}


def check_numbers(tensors: Mapping[str, Tensor]) -> None:
    """Raise a MismatchedTensors for tensors of no floating dtype."""
    strange = [key for key, tensor in tensors.items() if not tensor.is_floating_point()]
    if strange:
        raise MismatchedTensors(
            f"The adapter's file holds {listing(strange)} as {tensors[strange[0]].dtype}, which is "
            "no floating dtype. Save the adapter without quantising it.",
            unexpected=strange,
        )


def _check_keys(
    sites: Iterable[Site], method: Method, tensors: Mapping[str, Tensor], whole: Collection[str]
) -> None:
    expected = {f"{PREFIX}{site.name}.{word}" for site in sites for word in method.shapes(site)}
    missing = sorted(expected - tensors.keys(), key=natural)
    unexpected = sorted(tensors.keys() - expected - set(whole), key=natural)
    if not missing and not unexpected and expected:
        return
    lacks = f"lacks {listing(missing)}" if missing else ""
    holds = f"holds {listing(unexpected)}, which its configuration does not announce" if unexpected else ""
    fact = " and ".join(filter(None, (lacks, holds))) or f"holds no tensor of {method.peft_type}"
    near = listing(nearest(unexpected[0], expected)) if unexpected else ""
    raise MismatchedTensors(
        f"The adapter's file {fact}. {f'Nearest: {near}. ' if near else ''}{_remedy(unexpected, method)}",
        missing=missing,
        unexpected=unexpected,
    )


def _remedy(unexpected: Iterable[str], method: Method) -> str:
    words = {word.partition(".")[::2] for probe in probes("", method) for word in method.shapes(probe)}
    named = [rf"\.{root}\.[^.]+" + (rf"\.{leaf}$" if leaf else "$") for root, leaf in words]
    if any(re.search(pattern, key) for key in unexpected for pattern in named):
        return (
            "Its keys carry an adapter's name, as in a checkpoint that was saved with its tuner: "
            "`peftsurgery remove CHECKPOINT -o CLEAN --adapter-out DIR` takes the two apart."
        )
    return "Save or download the adapter again; modules that were trained whole belong in `modules_to_save`."
