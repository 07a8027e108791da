"""How a head model's names (`bert.encoder…`) and its bare base's (`encoder…`) become one another."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rename:
    """Takes a leading component off a name, or puts one before it; the other names stay."""

    drops: str = ""
    adds: str = ""

    def __call__(self, name: str) -> str:
        return (
            f"{self.adds}.{name}"
            if self.adds
            else name.removeprefix(f"{self.drops}.")
            if self.drops
            else name
        )


def renames(names: Collection[str], offered: Collection[str]) -> Iterator[Rename]:
    """Every renaming that could lead from `names` to `offered`, the plainest first."""
    yield Rename()
    yield from (Rename(drops=head) for head in _heads(names))
    yield from (Rename(adds=head) for head in _heads(offered))


def _heads(names: Collection[str]) -> list[str]:
    return list(dict.fromkeys(name.split(".", 1)[0] for name in names if "." in name))
