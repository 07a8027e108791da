"""The files that travel with a model's weights: configuration, labels, tokenizer, licence."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from peftsurgery.disk.durable import copy_file
from peftsurgery.errors import PlanError

PATTERNS = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.spm",
    "spiece.model",
    "sentencepiece.bpe.model",
    "target_vocab.json",
    "chat_template*",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
)


def carry(source: Path, directory: Path, *, but: Collection[str] = ()) -> None:
    """Copy what a model needs beside its weights, and nothing that goes stale (indexes, other formats).

    Args:
        but: names that are left out.
    """
    wanted = [file for file in sorted(source.iterdir()) if any(fnmatch(file.name, p) for p in PATTERNS)]
    code = sorted(source.glob("*.py")) if "auto_map" in _config(source) else []
    for file in [*wanted, *code]:
        if file.is_file() and file.name not in but and not (directory / file.name).exists():
            copy_file(file, directory / file.name)


def merged_config(
    source: Path, architecture: str, classes: Mapping[str, Any], *, dtype: str | None, untied: bool
) -> dict[str, Any]:
    """The source's config.json, saying what the merged model is: its class, labels, dtype and ties."""
    said = {**_config(source), "architectures": [architecture], **classes}
    if dtype is not None:
        said.pop("torch_dtype", None)
        said["dtype"] = dtype
    if untied:
        said["tie_word_embeddings"] = False
    return said


def config_changes(source: Path, architecture: str, classes: Mapping[str, Any]) -> list[str]:
    """The words of the source's config.json that would not be true of the merged model."""
    before, after = _config(source), merged_config(source, architecture, classes, dtype=None, untied=False)
    return [word for word, value in before.items() if after.get(word) != value]


def refuse_quantised(source: Path) -> None:
    """Raise a PlanError where a model's configuration says that its weights are quantised, whatever the format."""
    said = _config(source).get("quantization_config")
    if said:
        word = said.get("quant_method", "quantization_config") if isinstance(said, dict) else said
        raise PlanError(
            f"{source} is quantised (its config.json says {word!r}), and its stored numbers are not its weights. Merge "
            "into the unquantised base that it was made from and quantise the result; nothing was written."
        )


def _config(source: Path) -> dict[str, Any]:
    file = source / "config.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    return found if isinstance(found, dict) else {}
