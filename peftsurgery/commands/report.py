"""What a command did: prints well, and is JSON for scripts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Report:
    """What a command did.

    Args:
        verb: the command.
        headline: one sentence about it.
        facts: everything worth knowing, as JSON values; shown as `name  value` lines.
        table: rows to show under the facts, the first one being the header.
        body: text shown as it is (a plan, a tree).
        hint: what one would do next.
    """

    verb: str
    headline: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    table: Sequence[Sequence[str]] = ()
    body: str = ""
    hint: str = ""

    def to_json(self) -> str:
        """The verb, the headline and the facts, as one JSON object."""
        return json.dumps({"verb": self.verb, "headline": self.headline, **self.facts}, indent=2, default=str)

    def __str__(self) -> str:
        width = max((len(name) for name in self._shown()), default=0)
        lines = [
            self.headline,
            *(f"  {name:<{width}}  {_plain(value)}" for name, value in self._shown().items()),
        ]
        lines += [self.body] if self.body else []
        lines += columns(self.table)
        lines += [f"Next: {self.hint}"] if self.hint else []
        return "\n".join(lines)

    def _shown(self) -> dict[str, Any]:
        """The facts that fit on a line; with a body, which says the names, only single values."""
        return {name: value for name, value in self.facts.items() if _fits(value, lists=not self.body)}


def size(nbytes: float) -> str:
    """`1.5 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def _fits(value: Any, *, lists: bool) -> bool:
    if isinstance(value, list | tuple):
        return lists and 0 < len(value) <= 8 and not any(isinstance(item, dict | list) for item in value)
    return not isinstance(value, dict) and value not in (None, "")


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(str(v) for v in value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def columns(table: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, its first row being the header."""
    if not table:
        return []
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
