"""Sizes in words."""

from __future__ import annotations

import pytest

from peftsurgery.errors import PlanError
from peftsurgery.sizes import nbytes_named


@pytest.mark.parametrize(
    ("word", "size"),
    [
        (None, None),
        (4096, 4096),
        ("123", 123),
        ("5GB", 5 * 10**9),
        ("500 mb", 500 * 10**6),
        ("1.5G", 15 * 10**8),
        ("2GiB", 2**31),
        ("10kB", 10**4),
    ],
)
def test_a_size_is_a_number_of_bytes(word: str | int | None, size: int | None) -> None:
    assert nbytes_named(word) == size


@pytest.mark.parametrize("word", ["", "GB", "0", "-1", "5 apples", "1e9", "5GB5", 0])
def test_what_is_no_size_is_refused(word: str | int) -> None:
    with pytest.raises(PlanError, match="`5GB`, `500MB`"):
        nbytes_named(word)
