"""Taking apart a checkpoint that was saved with tuner modules inside: by its names alone.

A tuner stands around the module M that it tunes. The checkpoint then holds

    M.base_layer.weight               the base's own tensor M.weight
    M.<parameter>.<adapter>[.<rest>]  a parameter; PEFT's file calls it M.<parameter>[.<rest>]
    M.original_module.weight          the base's own M.weight, of a module that is trained whole
    M.modules_to_save.<adapter>.weight  its trained copy; PEFT's file calls it M.weight

all of it under `base_model.model.` when the PeftModel itself was saved.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from peftsurgery.disk.checkpoint import Checkpoint
from peftsurgery.disk.engines import local
from peftsurgery.disk.parts import Written, finish, outline, written
from peftsurgery.errors import CheckpointError
from peftsurgery.events import Listener, ignore

PREFIX = "base_model.model."
WRAPPED = ("base_layer", "original_module")
TUNER = re.compile(
    r"(?P<module>.+)\.(?P<word>modules_to_save|lora_\w+)\.(?P<adapter>[^.]+)(?P<rest>(\.[^.]+)*)"
)
"""What is a tuner's even where the base's own tensor beside it was dropped, as tied ones are when saved."""
BARE = ("lora_magnitude_vector",)
"""Parameters that a model holds in a module of their own, and the file without it."""


@dataclass(frozen=True, slots=True)
class Dissection:
    """What belongs to whom.

    Args:
        base: the base's own names → the names that the checkpoint has for them.
        adapters: for every adapter, the keys of PEFT's file → the names in the checkpoint.
    """

    base: Mapping[str, str]
    adapters: Mapping[str, Mapping[str, str]]


def dissect(names: Iterable[str]) -> Dissection:
    """Tell the base's tensors from the adapters'.

    Trained biases stand in the place of the base's own, which the checkpoint no longer has.

    Raises:
        CheckpointError: no tuner is in it, or two names mean the same tensor.
    """
    known = [(stored.removeprefix(PREFIX), stored) for stored in names]
    wrapped = {module for name, _ in known for module in _wrapped(name)}
    base: dict[str, str] = {}
    adapters: dict[str, dict[str, str]] = defaultdict(dict)
    for name, stored in known:
        own = _parameter(name, wrapped)
        target, key = (base, _clean(name)) if own is None else (adapters[own[0]], own[1])
        if key in target:
            raise CheckpointError(f"{stored!r} and {target[key]!r} are both {key!r}. Nothing was written.")
        target[key] = stored
    if not adapters:
        raise CheckpointError(
            "The checkpoint holds no tuner tensor (no `….base_layer.…`, no `….lora_A.…`): it is clean "
            "already. Use it as it is."
        )
    return Dissection(base, dict(adapters))


def extract(
    checkpoint: Checkpoint, found: Dissection, directory: Path, *, listen: Listener = ignore
) -> Written:
    """Write the clean base into an existing empty `directory`, bit for bit.

    Raises:
        CheckpointError: a file cannot be written.
    """
    clean = {stored: name for name, stored in found.base.items()}
    tasks = outline(checkpoint, directory, clean.get)
    return finish(directory, tasks, written(tasks, local, listen), checkpoint.index)


def _wrapped(name: str) -> Iterable[str]:
    """The modules around which, as `name` says, a tuner stands."""
    parts = name.split(".")
    return [".".join(parts[:at]) for at, part in enumerate(parts) if part in WRAPPED and at]


def _parameter(name: str, wrapped: Collection[str]) -> tuple[str, str] | None:
    """The adapter, and PEFT's key, of a tuner's tensor; None for one of the base's own."""
    parts = name.split(".")
    deepest = next((at for at in range(len(parts) - 1, 0, -1) if ".".join(parts[:at]) in wrapped), 0)
    if deepest and parts[deepest] not in WRAPPED and len(parts) > deepest + 1:
        word, adapter, *rest = parts[deepest:]
        return _keyed(".".join(parts[:deepest]), word, adapter, rest)
    found = TUNER.fullmatch(name)
    return found and _keyed(found["module"], found["word"], found["adapter"], found["rest"].split(".")[1:])


def _keyed(module: str, word: str, adapter: str, rest: list[str]) -> tuple[str, str]:
    told = [] if word == "modules_to_save" else [word]
    return adapter, PREFIX + ".".join([module, *told, *([] if word in BARE else rest)])


def _clean(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPED)
