"""Finding sites by name: what a pattern means, and the refusal of patterns that mean nothing.

A word is one of
    query               a full name, or the end of one after a dot, as in PEFT
    layer.*.query       a glob, on the full name or on its end after a dot
    re:.*\\.(q|v)_proj   a regular expression for the whole name; a compiled pattern says the same
    all-linear          every linear map but the output head
    output_adapter      every output of that role
A layer constraint binds every word but those that are a site's full name, as in PEFT.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from peftsurgery.errors import NoSiteMatched, PlanError, listing, nearest
from peftsurgery.site import Kind, Site

Word = str | re.Pattern[str]
Layers = int | str | Iterable[int | str]

ALL_LINEAR = "all-linear"
REGEX = "re:"
WIDEST_RANGE = 10_000


@dataclass(frozen=True, slots=True)
class Query:
    """What the user said about where.

    Args:
        targets: the words that select.
        exclude_modules: the words that take away again.
        layers_to_transform: the layer numbers that stay; none for all.
        layers_pattern: regular expressions for the name of the list of layers (`layers`, `h`); without
            one, the number is the first that follows two names.

    Raises:
        PlanError: no target, a broken regular expression, a layer pattern without layers.
    """

    targets: tuple[Word, ...]
    exclude_modules: tuple[Word, ...] = ()
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.targets:
            raise PlanError("No target was given. Name modules: `targets=['query']` or 'all-linear'.")
        if self.layers_pattern and not self.layers_to_transform:
            raise PlanError("layers_pattern comes without layers. Say which: `layers_to_transform='0-3'`.")
        for word in (*self.targets, *self.exclude_modules):
            _expression(word)
        for pattern in self.layers_pattern:
            _compiled(pattern)

    @classmethod
    def of(
        cls,
        targets: Word | Iterable[Word],
        exclude_modules: Word | Iterable[Word] | None = None,
        layers_to_transform: Layers | None = None,
        layers_pattern: str | Iterable[str] | None = None,
    ) -> Query:
        """The query in whatever form it was said: `"query,value"`, a list, `"re:…"`, layers as `"0-3,7"`."""
        patterns = (layers_pattern,) if isinstance(layers_pattern, str) else layers_pattern or ()
        return cls(
            targets=_words(targets),
            exclude_modules=_words(exclude_modules or ()),
            layers_to_transform=_layers(() if layers_to_transform is None else layers_to_transform),
            layers_pattern=tuple(pattern for pattern in patterns if pattern),
        )


@dataclass(frozen=True, slots=True)
class Selection:
    """What a query selects: the sites in the model's order, and for every target word its names."""

    sites: tuple[Site, ...]
    hits: Mapping[str, tuple[str, ...]]


def select(
    sites: Iterable[Site], query: Query, *, outputs: Collection[str] = (), reserved: Collection[str] = ()
) -> Selection:
    """The sites that `query` names, out of `sites`.

    Args:
        outputs: heads that `all-linear` passes over.
        reserved: modules that no word selects, nor anything in them.

    Raises:
        NoSiteMatched: a target, an exclusion or a layer number selects nothing.
    """
    offered = tuple(sites)
    found = _matches(query.targets, offered, outputs)
    excluded = _matches(query.exclude_modules, offered, outputs)
    for word, names in (*found.items(), *excluded.items()):
        if not names:
            raise _unmatched(word, offered)
    _check_layers(query, found)
    kept = [site.name for site in offered if any(_inside(site.name, module) for module in reserved)]
    selection = _narrowed(offered, query, found, [*excluded.values(), kept])
    for word in selection.hits:
        if not selection.hits[word]:
            raise _emptied(word, found[word])
    return selection


def chosen(sites: Iterable[Site], query: Query, *, outputs: Collection[str] = ()) -> Selection:
    """What `select` gives, where words that select nothing are no error: for part of a model's sites."""
    offered = tuple(sites)
    found = _matches(query.targets, offered, outputs)
    return _narrowed(offered, query, found, _matches(query.exclude_modules, offered, outputs).values())


def key_matches(key: str, name: str) -> bool:
    """Whether a key of PEFT's `rank_pattern` or `alpha_pattern` means the site `name`.

    Raises:
        PlanError: the key is no regular expression.
    """
    return key == name or _compiled(rf"(?:.*\.)?(?:{key})$").match(name) is not None


def label(word: Word) -> str:
    """The word as it is written in a message."""
    return word if isinstance(word, str) else REGEX + word.pattern


def _words(said: Word | Iterable[Word]) -> tuple[Word, ...]:
    if isinstance(said, re.Pattern) or (isinstance(said, str) and said.startswith(REGEX)):
        return (said,)
    parts = said.split(",") if isinstance(said, str) else said
    return tuple(dict.fromkeys(word for part in parts if (word := _word(part))))


def _word(said: object) -> Word:
    if isinstance(said, re.Pattern):
        return said
    if isinstance(said, str):
        return said.strip()
    raise PlanError(f"{said!r} is no pattern. Write names, globs or `re:…`: `targets=['query', 'value']`.")


def _layers(said: Layers) -> tuple[int, ...]:
    parts = said if isinstance(said, Iterable) and not isinstance(said, str) else str(said).split(",")
    return tuple(dict.fromkeys(index for part in parts for index in _range(str(part))))


def _range(part: str) -> Iterable[int]:
    bounds = re.fullmatch(r"\s*([0-9]{1,9})\s*(?:-\s*([0-9]{1,9})\s*)?", part)
    if bounds is None:
        raise PlanError(f"{part!r} names no layers. Write numbers or ranges: `layers_to_transform='0-3,7'`.")
    first = int(bounds[1])
    last = int(bounds[2] or first)
    if not 0 <= last - first < WIDEST_RANGE:
        raise PlanError(f"{part!r} is no range of layers. Write the smaller number first, e.g. '0-3'.")
    return range(first, last + 1)


@lru_cache(maxsize=8192)
def _compiled(expression: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except (re.error, OverflowError, TypeError) as error:
        raise PlanError(
            f"{expression!r} is no regular expression: {error}. Escape what is meant literally (`\\.`), "
            "or write a plain name or a glob. Nothing was changed."
        ) from None


def _expression(word: Word) -> re.Pattern[str] | None:
    """The pattern that a full name must match; None for a plain suffix and for `all-linear`."""
    if isinstance(word, re.Pattern):
        return word
    if word.startswith(REGEX):
        return _compiled(word.removeprefix(REGEX))
    return _compiled(r"(?:.*\.)?" + fnmatch.translate(word)) if set("*?[") & set(word) else None


def _matches(words: Iterable[Word], sites: Sequence[Site], outputs: Collection[str]) -> dict[str, list[str]]:
    dotted = [f".{site.name}" for site in sites]
    return {label(word): _matching(word, sites, dotted, outputs) for word in words}


def _matching(
    word: Word, sites: Sequence[Site], dotted: Sequence[str], outputs: Collection[str]
) -> list[str]:
    expression = _expression(word)
    if expression is not None:
        return [site.name for site in sites if expression.fullmatch(site.name)]
    if label(word).lower() == ALL_LINEAR:
        return [site.name for site in sites if site.kind is Kind.LINEAR and site.name not in outputs]
    end = f".{word}"
    named = zip(sites, dotted, strict=True)
    return [site.name for site, name in named if name.endswith(end) or site.role == word]


def _narrowed(
    sites: Sequence[Site], query: Query, found: Mapping[str, list[str]], excluded: Iterable[list[str]]
) -> Selection:
    out = {name for names in excluded for name in names}
    hits = {
        word: tuple(name for name in names if name not in out and (name == word or _in_layers(name, query)))
        for word, names in found.items()
    }
    kept = {name for names in hits.values() for name in names}
    return Selection(tuple(site for site in sites if site.name in kept), hits)


def _inside(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _in_layers(name: str, query: Query) -> bool:
    return not query.layers_to_transform or _layer(name, query.layers_pattern) in query.layers_to_transform


def _layer(name: str, patterns: Sequence[str]) -> int | None:
    """The number of the layer that `name` lies in: the first number, not an expert's inside the layer."""
    named = [rf"(?:.*?\.)?(?:{pattern})\.([0-9]+)\." for pattern in patterns]
    numbers = (_compiled(each).match(name) for each in named or [r".*?\.[^.]*\.([0-9]+)\."])
    return next((int(number[number.lastindex or 1]) for number in numbers if number), None)


def _check_layers(query: Query, found: Mapping[str, list[str]]) -> None:
    if not query.layers_to_transform:
        return
    bound = {name for word, names in found.items() for name in names if name != word}
    there = {layer for name in bound if (layer := _layer(name, query.layers_pattern)) is not None}
    for index in query.layers_to_transform:
        if index not in there:
            raise _no_layer(index, there, len(bound))


def _no_layer(index: int, there: Collection[int], count: int) -> NoSiteMatched:
    near = tuple(str(layer) for layer in sorted(there, key=lambda layer: abs(layer - index))[:3])
    unnumbered = "Name the list of layers, e.g. `layers_pattern='layers'` or 'h'."
    remedy = f"Nearest: {listing(near)}." if near else unnumbered
    return NoSiteMatched(
        f"Layer {index} holds none of the {_sites(count)} that the targets match. {remedy} "
        "Nothing was changed.",
        pattern=str(index),
        nearest=near,
    )


def _emptied(word: str, names: Sequence[str]) -> NoSiteMatched:
    return NoSiteMatched(
        f"{word!r} matched {_sites(len(names))} ({listing(names, 2)}); exclusions, layers and saved "
        "modules leave none. Drop the word or loosen them; nothing was changed.",
        pattern=word,
        nearest=names[:3],
    )


def _unmatched(word: str, sites: Sequence[Site]) -> NoSiteMatched:
    names = [site.name for site in sites]
    near = _near(word, names)
    shown = ", ".join(f"{end!r} ({_count(end, names)})" for end in near)
    meant = _as_regex(word, names)
    remedy = f"As a regular expression it is {meant!r}." if meant else f"Nearest: {shown or 'nothing'}."
    return NoSiteMatched(
        f"{word!r} matched none of {len(names)} sites. {remedy} Nothing was changed.",
        pattern=word,
        nearest=near,
    )


def _near(word: str, names: Sequence[str]) -> tuple[str, ...]:
    """The module suffixes most like a suffix word, or most like the last name within a pattern."""
    plain = _expression(word) is None
    end = word if plain else next(reversed(re.findall(r"\w+", word.removeprefix(REGEX))), "")
    depth = end.count(".") + 1
    return nearest(end, dict.fromkeys(".".join(name.split(".")[-depth:]) for name in names))


def _count(end: str, names: Sequence[str]) -> str:
    count = sum(f".{name}".endswith(f".{end}") for name in names)
    return _sites(count)


def _sites(count: int) -> str:
    return f"{count} site{'s' * (count != 1)}"


def _as_regex(word: str, names: Sequence[str]) -> str | None:
    """The word with `re:` before it, when that is what would have matched."""
    try:
        expression = re.compile(word)
    except re.error:
        return None
    return REGEX + word if any(map(expression.fullmatch, names)) else None
