"""What the JSON files of AdapterHub say, in our words; written against adapters 1.3.0."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from peftsurgery.adapter import Adapter
from peftsurgery.disk.peft_config import arguments as typed
from peftsurgery.disk.peft_config import text
from peftsurgery.errors import AdapterError, UnknownMethod
from peftsurgery.method import Method, Params
from peftsurgery.planning import Plan
from peftsurgery.reading import AS_PEFT, Reading

VERSION = "adapters.1.3.0"
"""The version of the format that is written."""
Config = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Said:
    """One configuration file.

    Args:
        name: what the adapter is called, in its keys too.
        config: the words of the method.
        layers: how many layers a prefix is for, where our own files say it.
        version: of the library that wrote it; None before version 3 of adapter-transformers.
    """

    name: str
    config: Mapping[str, Any]
    model_type: str | None = None
    hidden_size: int | None = None
    layers: int | None = None
    base: str | None = None
    version: str | None = None

    def adapter(
        self,
        plan: Plan,
        params: Mapping[str, Params],
        shared: Params | None = None,
        reading: Reading = AS_PEFT,
    ) -> Adapter:
        """The adapter of this file, without a head."""
        return Adapter(
            plan,
            params,
            self.name,
            shared=shared or {},
            base=self.base,
            model_type=self.model_type,
            reading=reading,
        )


@dataclass(frozen=True, slots=True)
class Written:
    """What is going to be written for one adapter: the words of its method, and its tensors by key."""

    config: Config
    tensors: list[tuple[str, Tensor]]
    more: Config = field(default_factory=dict)


def said(raw: Mapping[str, object]) -> Said:
    """The configuration in a file's JSON.

    Raises:
        AdapterError: a value of the wrong type, or none.
    """
    config, name = raw.get("config"), raw.get("name")
    if not isinstance(config, dict) or not isinstance(name, str) or not name or "." in name:
        raise AdapterError(
            f"`config` is {repr(config)[:40]} and `name` {name!r}; the words of a method and a name without dots "
            "are wanted. Save the adapter again with AdapterHub's library."
        )
    return Said(
        name,
        config,
        text(raw, "model_type"),
        _count(raw, "hidden_size"),
        _count(raw, "num_layers"),
        text(raw, "model_name"),
        text(raw, "version"),
    )


def full(said: Config, adapter: Adapter, name: str, width: int | None) -> Config:
    """A configuration file: the words of a method, and whose they are."""
    return dict(
        sorted(
            {
                "model_class": None,
                **said,
                "hidden_size": width,
                "model_name": adapter.base,
                "model_type": adapter.model_type,
                "name": name,
                "version": VERSION,
            }.items()
        )
    )


def refuse_options(config: Mapping[str, Any], understood: Collection[str]) -> None:
    """Raise an UnknownMethod for an option in force that is not understood."""
    for option, value in config.items():
        if option not in understood and value not in (None, False, "", 0, [], {}):
            raise UnknownMethod(
                f"The adapter uses `{option}` ({repr(value)[:60]}), which peftsurgery does not implement and "
                "without which it would compute something else. Use AdapterHub's library for it."
            )


def arguments(config: Mapping[str, Any], kind: type[Method]) -> Config:
    """The method's fields that the words give a value.

    Raises:
        AdapterError: a value of the wrong type.
    """
    own = {f.name for f in fields(kind)}
    return typed({key: value for key, value in config.items() if key in own}, kind)


def layers_left_out(config: Mapping[str, Any]) -> frozenset[int]:
    """`leave_out`: the numbers of layers without the adapter.

    Raises:
        AdapterError: it is no list of numbers.
    """
    value = config.get("leave_out") or []
    if not isinstance(value, list) or not all(type(number) is int for number in value):
        raise AdapterError(f"`leave_out` is {repr(value)[:60]}. It is a list of layer numbers.")
    return frozenset(value)


def _count(raw: Mapping[str, object], key: str) -> int | None:
    value = raw.get(key)
    return value if type(value) is int and value > 0 else None
