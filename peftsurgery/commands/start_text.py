"""The token ids of the text that virtual tokens start from, or are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from peftsurgery.disk.locate import locate
from peftsurgery.errors import CheckpointError, PlanError
from peftsurgery.method import Method, TokenMethod
from peftsurgery.methods import HardPrompt

if TYPE_CHECKING:
    from torch import nn

VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model", "*.spm", "*.tiktoken")
"""Files that hold a vocabulary; without one, transformers makes a tokenizer that knows no word."""


def start_ids(model: nn.Module, method: Method) -> list[int]:
    """What the tokenizer, the method's or the base's own, makes of `start_text`; nothing where there is none.

    Raises:
        PlanError: there is no tokenizer.
    """
    if not isinstance(method, TokenMethod) or method.start_text is None:
        return []
    named = getattr(method, "tokenizer_name_or_path", None) or getattr(model.config, "name_or_path", None)
    if not named:
        raise PlanError(
            "A start from a text needs a tokenizer, and the model does not say where its own is. "
            "Name it: `tokenizer_name_or_path='DIRECTORY'`."
        )
    return _ids(str(named), method.start_text)


def spelled(model: nn.Module, method: Method) -> Method:
    """A hard prompt with the ids of its text in its place; any other method as it is.

    Raises:
        PlanError: there is no tokenizer, or it makes nothing of the text.
    """
    if not isinstance(method, HardPrompt) or method.prompt_tuning_init_text is None:
        return method
    named = getattr(model.config, "name_or_path", None)
    if not named:
        raise PlanError(
            "A hard prompt's text needs a tokenizer, and the model does not say where its own is. Give the ids: "
            "`HardPrompt(tuple(tokenizer(TEXT, add_special_tokens=False).input_ids))`."
        )
    return method.spelled(_ids(str(named), method.prompt_tuning_init_text, special=False))


def _ids(named: str, text: str, special: bool = True) -> list[int]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(_directory(named))
        return list(tokenizer(text, add_special_tokens=special)["input_ids"])
    except (CheckpointError, OSError, ValueError) as error:
        raise PlanError(
            f"There is no tokenizer in {named!r} to read the start text with. "
            "Name one: `tokenizer_name_or_path='DIRECTORY'`."
        ) from error


def _directory(named: str) -> Path:
    path = locate(named)
    if not any(next(path.glob(pattern), None) for pattern in VOCABULARIES):
        raise OSError(f"{path} holds no vocabulary")
    return path
