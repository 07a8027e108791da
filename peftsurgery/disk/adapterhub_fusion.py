"""AdapterHub's AdapterFusion: a directory of its own, beside or around those of its members."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from peftsurgery.adapter import Adapter
from peftsurgery.disk.adapterhub_config import Config, Said, arguments, refuse_options
from peftsurgery.disk.adapterhub_keys import by_site, keyed, own
from peftsurgery.errors import AdapterError, MismatchedTensors, listing
from peftsurgery.method import Method
from peftsurgery.planning import Plan, Step

FUSION = "adapter_fusion_config.json"
SAFE, PICKLE = "model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin"
SETUP = "adapter_setup.json"
MARK = ".adapter_fusion_layer."
MEMBERS = "members"


def member_names(raw: Mapping[str, object]) -> list[str]:
    """The adapters that a fusion fuses, in its order.

    Raises:
        AdapterError: the file does not say them.
    """
    value = raw.get("adapter_names") or str(raw.get("name")).split(",")
    value = value.split(",") if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise AdapterError(f"`adapter_names` is {repr(value)[:60]}. It is a list of names.")
    return value


def setup_members(raw: Mapping[str, object]) -> list[str]:
    """The adapters of a set-up: those of its fusion, or its one adapter.

    Raises:
        AdapterError: it composes adapters in another way.
    """
    said = raw.get("adapter_setup")
    kind = said.get("type") if isinstance(said, dict) else None
    children = said.get("children") if isinstance(said, dict) else None
    names = [_single(child) for child in children] if isinstance(children, list) else []
    if not names or None in names or (kind != "Fuse" and len(names) > 1):
        raise AdapterError(
            f"The set-up is {repr(said)[:80]}, and peftsurgery reads a fusion of adapters, or one adapter. Load the "
            "adapters of the others one by one, from their own folders."
        )
    return [name for name in names if name is not None]


def setup(names: Sequence[str]) -> Config:
    """The set-up of a fusion of adapters, as AdapterHub says it."""
    return {"type": "Fuse", "children": [{"type": "single", "children": [name]} for name in names]}


def member_folder(path: Path, name: str) -> Path:
    """Where a member lies: in the fusion's directory, or beside it.

    Raises:
        AdapterError: in neither.
    """
    for folder in (path / name, path.parent / name):
        if (folder / "adapter_config.json").is_file():
            return folder
    raise AdapterError(
        f"The fusion in {path} fuses {name!r}, and there is no adapter in {path / name} or {path.parent / name}. Put "
        "it there."
    )


def understood(
    said: Said, tensors: Mapping[str, Tensor], members: list[Adapter], methods: Mapping[str, type[Method]]
) -> Adapter:
    """The fusion that its words, its tensors and its members make.

    Raises:
        UnknownMethod: an option that is not implemented.
        MismatchedTensors: it is not at the places of its members, or tensors are missing or unexpected.
        AdapterError: a member is no bottleneck, or a value has the wrong type.
    """
    kind = methods["fusion"]
    words: Config = {**said.config, "temperature": 1.0}  # true counts calls in training, and ends at 1
    refuse_options(words, {f.name for f in fields(kind)})
    found = by_site(own(tensors, MARK.strip("."), said.name), MARK, said)
    steps, params = [], {}
    for member in members:
        _check_places(said, found.keys(), member)
    for step in members[0].plan.steps:
        name = step.site.name
        inside: list[tuple[str, Any]] = [(m.name, _method_at(m, name)) for m in members]
        steps.append(Step(step.site, kind(**{**arguments(words, kind), MEMBERS: tuple(inside)})))
        inner = {f"{m.name}.{key}": t for m in members for key, t in m.params[name].items()}
        params[name] = {**found[name], **inner}
    return said.adapter(Plan(tuple(steps), members[0].plan.query), params)


def written(adapter: Adapter) -> tuple[Config, list[tuple[str, Tensor]], list[Adapter]]:
    """The words of a fusion, its tensors by key, and its members as adapters of their own.

    Raises:
        AdapterError: its sites differ, or a word of it has no equal in AdapterHub's.
    """
    steps = adapter.plan.steps
    names = [name for name, _ in _members(steps[0].method)]
    words = {key: value for key, value in asdict(steps[0].method).items() if key != MEMBERS}
    for step in steps:
        own = {key: value for key, value in asdict(step.method).items() if key != MEMBERS}
        if own != words or [name for name, _ in _members(step.method)] != names or own["temperature"] != 1.0:
            raise AdapterError(
                f"{step.site.name!r} has {step.method}; AdapterHub's fusion has the same members and words at all "
                "places, and no fixed temperature but 1."
            )
    own_params = {
        site: {key: t for key, t in params.items() if key.partition(".")[0] not in names}
        for site, params in adapter.params.items()
    }
    tensors = keyed(own_params, MARK, ",".join(names), adapter.model_type)
    members = [_member(adapter, name) for name in names]
    return {"config": {**words, "temperature": False}, "adapter_names": names}, tensors, members


def _single(child: object) -> str | None:
    """The name of an adapter that stands alone in a composition."""
    inner = child.get("children") if isinstance(child, dict) and child.get("type") == "single" else None
    return inner[0] if isinstance(inner, list) and len(inner) == 1 and isinstance(inner[0], str) else None


def _members(method: Method) -> tuple[tuple[str, Method], ...]:
    found: tuple[tuple[str, Method], ...] = vars(method)[MEMBERS]
    return found


def _member(adapter: Adapter, name: str) -> Adapter:
    steps = tuple(Step(s.site, dict(_members(s.method))[name]) for s in adapter.plan.steps)
    params = {
        site: {key.removeprefix(f"{name}."): t for key, t in own.items() if key.startswith(f"{name}.")}
        for site, own in adapter.params.items()
    }
    return Adapter(
        Plan(steps, adapter.plan.query), params, name, base=adapter.base, model_type=adapter.model_type
    )


def _method_at(member: Adapter, site: str) -> Method:
    return next(step.method for step in member.plan.steps if step.site.name == site)


def _check_places(said: Said, found: Any, member: Adapter) -> None:
    places = {step.site.name for step in member.plan.steps}
    lone = sorted(places ^ set(found))
    if lone:
        raise MismatchedTensors(
            f"The fusion {said.name!r} and its member {member.name!r} are not at the same places: only one of them "
            f"is at {listing(lone)}. Take the adapters that were fused.",
            missing=sorted(places - set(found)),
            unexpected=sorted(set(found) - places),
        )
