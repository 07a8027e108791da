"""How a plan is said in PEFT's `adapter_config.json`: in the user's words where PEFT has them too."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, fields, replace

from peftsurgery.adapter import Adapter
from peftsurgery.disk.peft_config import pattern_fields
from peftsurgery.errors import AdapterError
from peftsurgery.method import Method
from peftsurgery.planning import Plan, Step
from peftsurgery.select import ALL_LINEAR, REGEX, Query, Word, chosen
from peftsurgery.site import Kind, Layout, Site


def render(adapter: Adapter, modules_to_save: Sequence[str]) -> dict[str, object]:
    """The configuration as PEFT writes it.

    Raises:
        AdapterError: the steps differ in more than rank and alpha, which the format cannot say.
    """
    plan = adapter.plan
    method = _common(plan.steps)
    return {
        **{name: _number(value, type(method), name) for name, value in asdict(method).items()},
        **{word: _exceptions(plan.steps, method, field) for word, field in pattern_fields(type(method))},
        **_where(plan),
        "peft_type": method.peft_type,
        "task_type": adapter.task_type,
        "base_model_name_or_path": adapter.base,
        "bias": plan.bias,
        "modules_to_save": list(modules_to_save) or None,
        "fan_in_fan_out": any(s.kind is Kind.LINEAR and s.layout is Layout.IN_OUT for s in plan.sites),
        "inference_mode": True,
    }


def _common(steps: Sequence[Step]) -> Method:
    """The commonest method, when all others differ from it only where a pattern can say so."""
    if not steps:
        raise AdapterError(
            "The adapter stands at no site, and PEFT's format needs one. There is nothing to save."
        )
    method = Counter(step.method for step in steps).most_common(1)[0][0]
    for step in steps:
        same = {field: asdict(method)[field] for _, field in pattern_fields(type(step.method))}
        if type(step.method) is not type(method) or replace(step.method, **same) != method:
            raise AdapterError(
                f"{step.site.name!r} has {step.method} and others {method}; in PEFT's format only rank and "
                "alpha vary from site to site. Save them as two adapters."
            )
    return method


def _exceptions(steps: Sequence[Step], method: Method, field: str) -> dict[str, object]:
    names = [step.site.name for step in steps]
    return {
        _key(step.site.name, names): _number(asdict(step.method)[field], type(method), field)
        for step in steps
        if asdict(step.method)[field] != asdict(method)[field]
    }


def _key(name: str, names: Sequence[str]) -> str:
    """A pattern for one site alone: anchored where the name is also the end of another's."""
    return f"^{name}" if any(other.endswith(f".{name}") for other in names) else name


def _number(value: object, kind: type[Method], name: str) -> object:
    """Whole numbers as integers where the field's default is one, as PEFT writes them."""
    default = next(field.default for field in fields(kind) if field.name == name)
    whole = isinstance(default, int) and isinstance(value, float) and value.is_integer()
    return int(value) if whole else value  # type: ignore[call-overload]  # `whole` says it is a float


def _where(plan: Plan) -> dict[str, object]:
    """The query in PEFT's words, where it says the same thing there; else every site by its full name."""
    query = plan.query
    if query is None or not _sayable(query) or chosen(plan.sites, query).sites != plan.sites:
        return _names_only(plan.sites)
    return {
        "target_modules": _peft_words(query.targets),
        "exclude_modules": _peft_words(query.exclude_modules) or None,
        "layers_to_transform": list(query.layers_to_transform) or None,
        "layers_pattern": list(query.layers_pattern) or None,
    }


def _names_only(sites: Sequence[Site]) -> dict[str, object]:
    rest = ("exclude_modules", "layers_to_transform", "layers_pattern")
    return {"target_modules": [site.name for site in sites], **dict.fromkeys(rest)}


def _sayable(query: Query) -> bool:
    """Whether PEFT has these words: a list of plain names, or one regular expression and no layers."""
    layers_fit = all(map(_is_plain, query.targets)) or not query.layers_to_transform
    return layers_fit and _is_sayable(query.targets) and _is_sayable(query.exclude_modules)


def _is_sayable(words: Sequence[Word]) -> bool:
    return all(map(_is_plain, words)) or (len(words) == 1 and str(words[0]).startswith(REGEX))


def _is_plain(word: Word) -> bool:
    return isinstance(word, str) and re.search(r"[*?\[]|^re:", word) is None and word.lower() != ALL_LINEAR


def _peft_words(words: Sequence[Word]) -> str | list[str]:
    plain = [str(word) for word in words]
    return plain[0].removeprefix(REGEX) if len(plain) == 1 and plain[0].startswith(REGEX) else plain
