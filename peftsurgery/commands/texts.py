"""The texts that two models are compared on, as their own tokenizer reads them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from peftsurgery.errors import PlanError

TOGETHER = 8
"""How many texts one batch has."""
BUILT_IN = (
    "Once upon a time there was a little girl.",
    "The parcel came two weeks late and nobody answers the phone.",
    "Thank you, that was quick and friendly.",
    "In 1987, 14 % of all letters went astray; by 1990 it was 3.5 %.",
    "Why?",
    "Le chat dort sur le toit, und der Hund bellt im Garten.",
    "She opened the door, looked at the rain, closed it again and went to look for the old umbrella that her "
    "grandmother had left in the hall many years before.",
)


def rows(texts: str | Path | None, homes: Iterable[Path], vocab_size: int) -> list[list[int]]:
    """The token ids of every text: of a file, one a line, or the built-in ones; none where there is no tokenizer.

    Args:
        homes: where a tokenizer may be; the first that is there reads.

    Raises:
        PlanError: the file cannot be read or is empty, there is no tokenizer for it, or one of another model.
    """
    said = BUILT_IN if texts is None else _lines(Path(texts))
    home = next((place for place in homes if _has_tokenizer(place)), None)
    if home is None:
        if texts is not None:
            raise PlanError(
                f"Neither model has a tokenizer to read {texts} with. Copy tokenizer.json and tokenizer_config.json "
                "beside one, or leave out `--texts`."
            )
        return []
    return _read(home, said, vocab_size)


def batches(found: Sequence[list[int]]) -> list[Sequence[list[int]]]:
    """The first text alone, and all texts together, padded, eight at a time."""
    together = [found[i : i + TOGETHER] for i in range(0, len(found), TOGETHER)]
    return [found[:1], *together] if len(found) > 1 else together


def _lines(file: Path) -> tuple[str, ...]:
    try:
        found = tuple(line for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{file} cannot be read: {error}. Name a text file, one text a line.") from error
    if not found:
        raise PlanError(f"{file} holds no text. Write one a line.")
    return found


def _has_tokenizer(home: Path) -> bool:
    return (home / "tokenizer_config.json").is_file() or (home / "tokenizer.json").is_file()


def _read(home: Path, texts: Sequence[str], vocab_size: int) -> list[list[int]]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(home)
    except (OSError, ValueError) as error:
        raise PlanError(
            f"The tokenizer in {home} cannot be read: {error}. Copy the model's own there."
        ) from error
    found = [list(tokenizer(text)["input_ids"]) for text in texts]
    highest = max((max(row, default=0) for row in found), default=0)
    if highest >= vocab_size:
        raise PlanError(
            f"The tokenizer in {home} gives token {highest}, and the model has {vocab_size}. "
            "Copy the model's own there."
        )
    return [row for row in found if row]
