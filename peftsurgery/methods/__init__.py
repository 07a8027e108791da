"""The methods by the word for them; adding one is a file here and a word in `METHODS`."""

from __future__ import annotations

from collections.abc import Mapping

from peftsurgery.method import Method
from peftsurgery.methods.bottleneck import Bottleneck
from peftsurgery.methods.configs import CONFIGS, Config
from peftsurgery.methods.fusion import AdapterFusion
from peftsurgery.methods.hard import HardPrompt
from peftsurgery.methods.lora import LoRA
from peftsurgery.methods.p_tuning import PTuning
from peftsurgery.methods.prefix import PrefixTuning
from peftsurgery.methods.prompt import PromptTuning

METHODS: Mapping[str, type[Method]] = {
    method.name: method for method in (LoRA, PromptTuning, PTuning, PrefixTuning, Bottleneck, AdapterFusion)
}

__all__ = [
    "CONFIGS",
    "METHODS",
    "AdapterFusion",
    "Bottleneck",
    "Config",
    "HardPrompt",
    "LoRA",
    "PTuning",
    "PrefixTuning",
    "PromptTuning",
]
