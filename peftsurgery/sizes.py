"""The words for sizes."""

from __future__ import annotations

import re

from peftsurgery.errors import PlanError

UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}


def nbytes_named(word: str | int | None) -> int | None:
    """The bytes that `5GB`, `500MB` or `2GiB` are; None stays None.

    Raises:
        PlanError: it is no size.
    """
    if word is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?|)b?\s*", str(word).lower())
    size = int(float(found[1]) * UNITS[found[2]]) if found else 0
    if size < 1:
        raise PlanError(f"{word!r} is no size of a file. Write it as `5GB`, `500MB` or a number of bytes.")
    return size
