"""Hyper-parameters from the command line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from peftsurgery.errors import PlanError, listing, nearest
from peftsurgery.method import Method
from peftsurgery.methods import CONFIGS, METHODS, Config, HardPrompt
from peftsurgery.reading import Reading

WORDS: Mapping[str, type[Method]] = {**METHODS, HardPrompt.name: HardPrompt}
"""What can be said: the methods of the files, and one that is written as another."""


def method_named(
    word: str, settings: Iterable[str], common: Mapping[str, Any], config: str | None = None
) -> Method:
    """The method that `--method`, `--config`, `--set name=value` and the common flags say.

    Raises:
        PlanError: no such method or hyper-parameter, or a configuration of another method.
    """
    if word not in WORDS:
        raise PlanError(f"{word!r} is no method. peftsurgery has {listing(list(WORDS), len(WORDS))}.")
    cls = WORDS[word]
    known = [field.name for field in fields(cls)]
    said = {name: value for name, value in common.items() if value is not None}
    said |= {name: _value(text) for name, text in _pairs(settings)}
    for name in said:
        if name not in known:
            near = listing(nearest(name, known)) or listing(known)
            raise PlanError(f"{word} has no hyper-parameter {name!r}. Nearest: {near}. Nothing was changed.")
    if config is None:
        return cls(**said)
    start = config_named(config).method
    if type(start) is not cls:
        raise PlanError(
            f"--config {config} is for bottlenecks. Add `--method bottleneck`; nothing was changed."
        )
    return replace(start, **said)


def config_named(word: str) -> Config:
    """A bottleneck and its places, by the word for them.

    Raises:
        PlanError: no such configuration.
    """
    if word not in CONFIGS:
        raise PlanError(
            f"{word!r} is no configuration. peftsurgery has {listing(list(CONFIGS), len(CONFIGS))}."
        )
    return CONFIGS[word]


def numbers(settings: Iterable[str]) -> dict[str, Any] | None:
    """`KEY=NUMBER` words as a mapping; None for none."""
    return {name: _value(text) for name, text in _pairs(settings)} or None


def whole_numbers(said: str | Sequence[int], name: str) -> list[int]:
    """`1,8` or numbers, each once, from the least on.

    Raises:
        PlanError: one of them is no whole number above 0.
    """
    words = said.split(",") if isinstance(said, str) else [str(number) for number in said]
    if not words or not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise PlanError(f"{name} is {said!r}. Name whole numbers above 0, as in `--{name} 1,8`.")
    return sorted({int(word) for word in words})


def _pairs(settings: Iterable[str]) -> Iterable[tuple[str, str]]:
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise PlanError(f"{setting!r} says no value. Write `--set {setting}=VALUE`.")
        yield name, text


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)


__all__ = ["Reading", "config_named", "method_named", "numbers", "whole_numbers"]
