"""What PEFT's `adapter_config.json` says, in our words.

Written against PEFT 0.21.2 (https://huggingface.co/docs/peft). A method's fields have the names of
the file's keys, so a method needs nothing here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from peftsurgery.errors import AdapterError, UnknownMethod, listing
from peftsurgery.method import Method
from peftsurgery.select import ALL_LINEAR, REGEX, Query, Word
from peftsurgery.site import Layout

PATTERNS = {"rank_pattern": ("r",), "alpha_pattern": ("lora_alpha", "alpha")}
"""Keys whose values override one field of the method, site by site."""
PLANNED = {
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "bias",
    "modules_to_save",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
}
HARMLESS = {
    "auto_mapping",
    "peft_version",
    "revision",
    "inference_mode",
    "runtime_config",
    "megatron_core",
    "qalora_group_size",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "init_lora_weights",
    "ensure_weight_tying",
}
"""Keys that change nothing about what a trained adapter computes."""
STARTS = ("eva", "orthogonal", "mica")
"""Initialisations that leave the base alone, so that a trained adapter no longer shows them."""
REBASING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that change the base, so that the adapter means nothing on the original."""
BIASES = ("none", "lora_only", "all")


@dataclass(frozen=True, slots=True)
class Config:
    """What the file says: the method, where it stands, and the exceptions to it by field and pattern."""

    method: Method
    query: Query | None
    patterns: Mapping[str, Mapping[str, object]]
    layout: Layout
    bias: str
    modules_to_save: tuple[str, ...]
    task_type: str | None
    base: str | None
    twins: bool = False
    """Whether the file may hold a tied twin's tensors too, which its words do not name."""


def parse(raw: Mapping[str, object], methods: Mapping[str, type[Method]]) -> Config:
    """The configuration in our words.

    Raises:
        UnknownMethod: a method, or an option of one, that is not implemented.
        AdapterError: a value of the wrong type.
        PlanError: a value out of its range.
    """
    kind = method_of(raw, methods)
    refuse_options(raw, PLANNED | {field.name for field in fields(kind)})
    bias = raw.get("bias") or "none"
    if bias not in BIASES:
        raise AdapterError(f"`bias` is {bias!r}. It is one of {listing(BIASES)}.")
    return Config(
        method=kind(**arguments(raw, kind)),
        query=_query(raw),
        patterns={field: _mapping(raw, word) for word, field in pattern_fields(kind)},
        layout=Layout.IN_OUT if raw.get("fan_in_fan_out") else Layout.OUT_IN,
        bias=str(bias),
        modules_to_save=names(raw, "modules_to_save"),
        task_type=text(raw, "task_type"),
        base=text(raw, "base_model_name_or_path"),
        twins=bool(raw.get("ensure_weight_tying")),
    )


def method_of(raw: Mapping[str, object], methods: Mapping[str, type[Method]]) -> type[Method]:
    """The method that `peft_type` names.

    Raises:
        UnknownMethod: it is none of `methods`.
    """
    known = {method.peft_type: method for method in methods.values() if method.peft_type is not None}
    named = raw.get("peft_type")
    if isinstance(named, str) and named in known:
        return known[named]
    raise UnknownMethod(
        f"`peft_type` is {named!r}, and peftsurgery reads {listing(tuple(known))}. "
        "Use peft for this adapter: `PeftModel.from_pretrained(base, adapter)`."
    )


def refuse_options(raw: Mapping[str, object], understood: Collection[str]) -> None:
    """Raise an UnknownMethod for an option in force that is neither understood nor harmless."""
    start = str(raw.get("init_lora_weights")).lower()
    if start.startswith(REBASING):
        raise UnknownMethod(
            f"`init_lora_weights` is {start!r}, which changes the base too, so this is not all of it. Save "
            "it from peft as a plain LoRA: `save_pretrained(…, path_initial_model_for_weight_conversion=…)`."
        )
    for option, value in raw.items():
        if option not in understood and option not in HARMLESS and value not in (None, False, "", [], {}):
            raise UnknownMethod(
                f"The adapter uses `{option}` ({repr(value)[:60]}), which peftsurgery does not implement and "
                "without which it would compute something else. Use peft for it; where peft can merge it, "
                "`PeftModel.from_pretrained(base, adapter).merge_and_unload()` gives a plain checkpoint."
            )


def arguments(raw: Mapping[str, object], kind: type[Method]) -> dict[str, Any]:
    """The method's fields that the file gives a value.

    Raises:
        AdapterError: a value of the wrong type.
    """
    given = {field.name: raw[field.name] for field in fields(kind) if raw.get(field.name) is not None}
    start = given.get("init_lora_weights")
    if start is False or start in STARTS:
        del given["init_lora_weights"]
    for name, hint in get_type_hints(kind).items():
        if name in given and not _fits(given[name], hint):
            raise AdapterError(
                f"`{name}` is {repr(given[name])[:60]}, which is no {getattr(hint, '__name__', hint)}."
            )
    return given


def _fits(value: object, hint: Any) -> bool:
    """Whether a value of the file is what a field takes; an integer may be a float, a truth value not."""
    if isinstance(value, bool) and hint in (int, float):
        return False
    return isinstance(value, int | float if hint is float else hint)


def _query(raw: Mapping[str, object]) -> Query | None:
    targets = raw.get("target_modules")
    if not targets:
        return None
    return Query.of(
        _said(targets),
        _said(raw.get("exclude_modules") or ()),
        raw.get("layers_to_transform"),  # type: ignore[arg-type]  # Query.of refuses what is no layer
        raw.get("layers_pattern"),  # type: ignore[arg-type]
    )


def _said(words: object) -> Word | Sequence[Word]:
    """PEFT reads a bare string as a regular expression, and the words of a list as names."""
    if isinstance(words, str):
        return words if words.lower() == ALL_LINEAR else REGEX + words
    if isinstance(words, list | tuple) and all(isinstance(word, str) for word in words):
        return tuple(words)
    raise AdapterError(
        f"{repr(words)[:60]} names no modules. Write a list of names, or a regular expression."
    )


def pattern_fields(kind: type[Method]) -> Iterator[tuple[str, str]]:
    """The patterns of PEFT that a method has a field for: `("rank_pattern", "r")`, …"""
    own = {field.name for field in fields(kind)}
    for word, candidates in PATTERNS.items():
        yield from ((word, field) for field in candidates if field in own)


def _mapping(raw: Mapping[str, object], key: str) -> Mapping[str, object]:
    value = raw.get(key) or {}
    if not isinstance(value, dict) or not all(isinstance(number, int | float) for number in value.values()):
        raise AdapterError(f"`{key}` is {repr(value)[:60]}. It maps names of modules to numbers.")
    return value


def names(raw: Mapping[str, object], key: str) -> tuple[str, ...]:
    """A list of names; an AdapterError where it is none."""
    value = raw.get(key) or ()
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) and name for name in value):
        raise AdapterError(f"`{key}` is {repr(value)[:60]}. It is a list of names.")
    return tuple(value)


def text(raw: Mapping[str, object], key: str) -> str | None:
    """A text that says something, or None."""
    value = raw.get(key)
    return value if isinstance(value, str) and value else None
