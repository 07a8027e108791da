"""The methods by the word for them; adding one is a file here and a word in `METHODS`."""

from __future__ import annotations

from collections.abc import Mapping

from peftsurgery.method import Method
from peftsurgery.methods.lora import LoRA

METHODS: Mapping[str, type[Method]] = {method.name: method for method in (LoRA,)}

__all__ = ["METHODS", "LoRA"]
