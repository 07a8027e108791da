"""peftsurgery: the operating table for models with parameter-efficient adapters.

Everything here is imported when it is first used, so that `import peftsurgery` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "adapter",
    "AdapterFusion": "methods",
    "Bottleneck": "methods",
    "CONFIGS": "methods",
    "Event": "events",
    "HardPrompt": "methods",
    "Kind": "site",
    "Layout": "site",
    "LoRA": "methods",
    "METHODS": "methods",
    "PTuning": "methods",
    "Plan": "planning",
    "PrefixTuning": "methods",
    "PromptTuning": "methods",
    "Reading": "reading",
    "Report": "commands.report",
    "Site": "site",
    "Step": "planning",
    "SurgeryError": "errors",
    "activate": "live.active",
    "adapters": "live.active",
    "bake": "commands.bake",
    "bench": "commands.bench",
    "convert": "commands.convert",
    "export_onnx": "commands.export_onnx",
    "folded": "fold",
    "generate": "commands.generate",
    "inject": "commands.inject",
    "inspect": "commands.inspect",
    "load_adapter": "commands.adapter_files",
    "merge": "commands.merge",
    "plan": "commands.inject",
    "regularization": "live.active",
    "remove": "commands.remove",
    "rescale": "live.active",
    "save_adapter": "commands.adapter_files",
    "scale": "adapter",
    "sites": "commands.inspect",
    "trainable_parameters": "live.active",
    "unmerge": "commands.in_place",
    "verify": "commands.verify",
}

__all__ = [
    "CONFIGS",
    "METHODS",
    "Adapter",
    "AdapterFusion",
    "Bottleneck",
    "Event",
    "HardPrompt",
    "Kind",
    "Layout",
    "LoRA",
    "PTuning",
    "Plan",
    "PrefixTuning",
    "PromptTuning",
    "Reading",
    "Report",
    "Site",
    "Step",
    "SurgeryError",
    "activate",
    "adapters",
    "bake",
    "bench",
    "convert",
    "export_onnx",
    "folded",
    "generate",
    "inject",
    "inspect",
    "load_adapter",
    "merge",
    "plan",
    "regularization",
    "remove",
    "rescale",
    "save_adapter",
    "scale",
    "sites",
    "trainable_parameters",
    "unmerge",
    "verify",
]

if TYPE_CHECKING:
    from peftsurgery.adapter import Adapter, scale
    from peftsurgery.commands.adapter_files import load_adapter, save_adapter
    from peftsurgery.commands.bake import bake
    from peftsurgery.commands.bench import bench
    from peftsurgery.commands.convert import convert
    from peftsurgery.commands.export_onnx import export_onnx
    from peftsurgery.commands.generate import generate
    from peftsurgery.commands.in_place import unmerge
    from peftsurgery.commands.inject import inject, plan
    from peftsurgery.commands.inspect import inspect, sites
    from peftsurgery.commands.merge import merge
    from peftsurgery.commands.remove import remove
    from peftsurgery.commands.report import Report
    from peftsurgery.commands.verify import verify
    from peftsurgery.errors import SurgeryError
    from peftsurgery.events import Event
    from peftsurgery.fold import folded
    from peftsurgery.live.active import activate, adapters, regularization, rescale, trainable_parameters
    from peftsurgery.methods import (
        CONFIGS,
        METHODS,
        AdapterFusion,
        Bottleneck,
        HardPrompt,
        LoRA,
        PrefixTuning,
        PromptTuning,
        PTuning,
    )
    from peftsurgery.planning import Plan, Step
    from peftsurgery.reading import Reading
    from peftsurgery.site import Kind, Layout, Site


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'peftsurgery' has no attribute {name!r}")
    value = getattr(import_module(f"peftsurgery.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
