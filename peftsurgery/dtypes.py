"""The words for dtypes."""

from __future__ import annotations

import torch

from peftsurgery.errors import PlanError, listing

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def dtype_named(word: str | None) -> torch.dtype | None:
    """The dtype that a word names; None stays None.

    Raises:
        PlanError: it names none that a model is written in.
    """
    if word is not None and word not in DTYPES:
        raise PlanError(f"{word!r} is no dtype to write a model in. Take one of {listing(list(DTYPES))}.")
    return None if word is None else DTYPES[word]
