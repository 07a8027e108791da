"""Tables of results in pages of the documentation, between two comments."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Slot:
    """A place for a table: between `<!-- name: begin -->` and `<!-- name: end -->` in `page`."""

    page: Path
    name: str

    def filled(self, table: str) -> str:
        """The page with the table in its place."""
        begin, end = (f"<!-- {self.name}: {word} -->" for word in ("begin", "end"))
        before, rest = self.page.read_text(encoding="utf-8").split(begin)
        return f"{before}{begin}\n\n{table}\n\n{end}{rest.split(end)[1]}"

    def fill(self, table: str) -> None:
        """Write the table into the page."""
        self.page.write_text(self.filled(table), encoding="utf-8")

    def shows(self, table: str) -> bool:
        """Whether the page has this table."""
        return self.filled(table) == self.page.read_text(encoding="utf-8")


def number(value: float) -> str:
    """A figure of a table: `3e-6`, `0`."""
    return f"{value:.0e}".replace("e-0", "e-") if value else "0"
