"""Options that together say one value are taken out of the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peftsurgery.flags.common import READINGS
from peftsurgery.flags.tuning import SETTINGS


def chosen_method(options: dict[str, Any], *, needed: bool = True) -> Callable[[], Any]:
    """Take what says a method out of the options; called, it makes the method, or None of no words."""
    common = {name: options.pop(name, None) for name in SETTINGS}
    common["prefix_projection"] = common["prefix_projection"] or None
    settings, word, config = options.pop("settings"), options.pop("method"), options.pop("config", None)
    if common["prompt_tuning_init_text"] is not None and word != "hard-prompt":
        common["prompt_tuning_init"] = "TEXT"
    if common["encoder_reparameterization_type"] is not None:
        common["encoder_reparameterization_type"] = common["encoder_reparameterization_type"].upper()

    def make() -> Any:
        from peftsurgery.commands.words import method_named

        said = needed or settings or any(value is not None for value in common.values())
        return method_named(word, settings, common, config) if said else None

    return make


def chosen_reading(options: dict[str, Any]) -> Callable[[], Any]:
    """Take what says a reading of virtual tokens out of the options; called, it makes the reading."""
    words = {name: options.pop(name) for name in READINGS}

    def make() -> Any:
        from peftsurgery.commands.words import Reading

        return Reading(**words)

    return make
