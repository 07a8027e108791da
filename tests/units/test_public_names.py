"""The public surface, written down once."""

from __future__ import annotations

import inspect

import pytest

import peftsurgery as ps
from peftsurgery.cli import main
from peftsurgery.flags.common import READINGS
from peftsurgery.flags.tuning import SETTINGS

SHOWING = {"verbose", "quiet", "as_json"}
SAYING_A_METHOD = {"settings", "config", *SETTINGS}
PYTHON_ONLY = {"listen", "trainable", "reading"}
"""Progress is drawn by the command line itself, and a directory has nothing that requires gradients.
A reading is said by flags of its own."""


def test_public_names() -> None:
    assert set(ps.__all__) == {
        *(
            "Adapter",
            "AdapterFusion",
            "Bottleneck",
            "CONFIGS",
            "Event",
            "HardPrompt",
            "Kind",
            "Layout",
            "LoRA",
            "METHODS",
            "PTuning",
            "Plan",
            "PrefixTuning",
            "PromptTuning",
            "Reading",
            "Report",
            "Site",
            "Step",
            "SurgeryError",
        ),
        *(
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
        ),
        *(
            "regularization",
            "remove",
            "rescale",
            "save_adapter",
            "scale",
            "sites",
            "trainable_parameters",
            "unmerge",
            "verify",
        ),
    }
    assert all(getattr(ps, name) is not None for name in ps.__all__)
    assert set(ps.__all__) <= set(dir(ps))


@pytest.mark.parametrize("word", sorted(main.commands))
def test_a_command_takes_what_its_function_takes(word: str) -> None:
    function = getattr(ps, word.replace("-", "_"))
    wanted = set(inspect.signature(function).parameters) - PYTHON_ONLY
    options = {parameter.name for parameter in main.commands[word].params} - SHOWING
    if "reading" in inspect.signature(function).parameters:
        options -= set(READINGS)
    if "method" in options:
        options -= SAYING_A_METHOD
    assert options == wanted


@pytest.mark.parametrize("name", [n for n in ps.__all__ if inspect.isfunction(getattr(ps, n))])
def test_public_functions_are_documented(name: str) -> None:
    assert len(inspect.getdoc(getattr(ps, name)) or "") > 40
