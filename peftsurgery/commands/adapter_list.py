"""The adapters of a fleet: a list of them in a text file, or a directory of them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peftsurgery.commands.adapter_files import is_adapter
from peftsurgery.errors import PlanError

FORM = "A list has an adapter's directory on every line, as `path` or `name=path`"
LISTED = 8
"""How many faults of a list are told."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One adapter of a fleet.

    Args:
        name: what its merged model is called: a directory of that name.
        path: the adapter's directory.
        place: where it was named, as `line 3`.
    """

    name: str
    path: Path
    place: str


def listed(source: str | Path | Mapping[str, str | Path]) -> tuple[Entry, ...]:
    """The adapters that are named, every one of which is there and has a name of its own.

    Args:
        source: a text file with a line `path` or `name=path` for each, relative to the file's own directory, and
            comments after `#`; a directory whose subdirectories are adapters; or names → directories. An adapter
            is called after its directory, unless a name is said.

    Raises:
        PlanError: it cannot be read, names none, or some are missing or named twice; all of those are told.
    """
    if isinstance(source, Mapping):
        entries = [Entry(name, Path(path).expanduser(), repr(name)) for name, path in source.items()]
    elif Path(source).expanduser().is_dir():
        entries = _inside(Path(source).expanduser())
    else:
        entries = list(_lines(Path(source).expanduser()))
    said = "What was given" if isinstance(source, Mapping) else source
    if not entries:
        raise PlanError(f"{said} names no adapter. {FORM}; nothing was written.")
    faults = list(_faults(entries))
    if faults:
        more = len(faults) - LISTED
        told = "; ".join(faults[:LISTED]) + (f"; and {more} more" if more > 0 else "")
        raise PlanError(f"{said} cannot be merged as it is: {told}. Correct it; nothing was written.")
    return tuple(entries)


def _inside(source: Path) -> list[Entry]:
    found = sorted(path for path in source.iterdir() if path.is_dir() and is_adapter(path))
    return [Entry(path.name, path, repr(path.name)) for path in found]


def _lines(source: Path) -> Iterator[Entry]:
    try:
        text = source.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(
            f"{source} cannot be read as a list ({error}). {FORM}; nothing was written."
        ) from error
    for number, line in enumerate(text.splitlines(), 1):
        words = _without_comment(line)
        if words:
            name, path = _parted(words)
            yield Entry(name, source.parent / Path(path).expanduser(), f"line {number}")


def _without_comment(line: str) -> str:
    """What stands before a `#` that begins the line or a word; one inside a word belongs to it."""
    return re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip()


def _parted(words: str) -> tuple[str, str]:
    """Name and path; what stands before a `=` is a name unless it holds a `/`."""
    name, equals, path = words.partition("=")
    if equals and "/" not in name:
        return name.strip(), path.strip()
    return Path(words).expanduser().absolute().name, words


def _faults(entries: Sequence[Entry]) -> Iterator[str]:
    for entry in entries:
        if not entry.path.is_dir():
            yield f"{entry.path} ({entry.place}) is not there"
        elif not is_adapter(entry.path):
            yield f"{entry.path} ({entry.place}) holds no adapter"
        if entry.name.startswith(".") or not entry.name.strip() or set(entry.name) & set("/\\\0\n"):
            yield f"{entry.name!r} ({entry.place}) cannot be the name of a directory"
    for same in _alike(entries, lambda entry: entry.name.casefold()):
        yield f"{same[0].name!r} ({_places(same)}) names several adapters"
    for same in _alike(entries, lambda entry: str(entry.path.resolve())):
        yield f"{same[0].path} ({_places(same)}) is there several times"


def _alike(entries: Sequence[Entry], key: Callable[[Entry], str]) -> Iterator[list[Entry]]:
    groups: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[key(entry)].append(entry)
    return (group for group in groups.values() if len(group) > 1)


def _places(entries: Sequence[Entry]) -> str:
    return ", ".join(entry.place for entry in entries)
