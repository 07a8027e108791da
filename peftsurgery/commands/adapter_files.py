"""Adapters from and to directories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from peftsurgery.adapter import Adapter, scale
from peftsurgery.disk import peft
from peftsurgery.disk.locate import locate
from peftsurgery.disk.writer import staged
from peftsurgery.errors import AdapterError, PlanError
from peftsurgery.methods import METHODS

Adapters = Adapter | str | Path | Sequence[Adapter | str | Path]


def load_adapter(path: str | Path, *, name: str = "default", allow_pickle: bool = False) -> Adapter:
    """The adapter in a directory, in PEFT's file format, every tensor checked.

    Args:
        path: the directory, or a hub id in the local cache.
        name: what it will be called on a model.
        allow_pickle: read a `.bin` where there is no `.safetensors` (with `weights_only=True`).

    Raises:
        UnknownMethod, MismatchedTensors, NonFiniteWeight, UntrustedPickle, AdapterError.
    """
    return peft.read(locate(path), METHODS, name=name, allow_pickle=allow_pickle)


def save_adapter(adapter: Adapter, out: str | Path, *, format: str = "peft") -> Path:
    """Write the adapter as a directory that PEFT loads; all of it or nothing.

    Raises:
        AdapterError: the format is not known.
        CheckpointError: `out` is not empty, or cannot be written.
    """
    if format != "peft":
        raise AdapterError(f"{format!r} is no adapter format that peftsurgery writes. Take `format='peft'`.")
    with staged(Path(out)) as directory:
        peft.write(adapter, directory)
    return Path(out)


def gather(adapters: Adapters, weight: Sequence[float] = (), *, allow_pickle: bool = False) -> list[Adapter]:
    """Adapters in whatever form they were given, loaded and scaled.

    Raises:
        PlanError: there are more weights than adapters, or none of the latter.
    """
    given = [adapters] if isinstance(adapters, Adapter | str | Path) else list(adapters)
    if not given or len(weight) not in (0, len(given)):
        raise PlanError(
            f"{len(given)} adapters come with {len(weight)} weights. Give every adapter one `--weight`, or none."
        )
    weights = weight or [1.0] * len(given)
    return [_scaled(_loaded(one, allow_pickle), by) for one, by in zip(given, weights, strict=True)]


def _loaded(one: Adapter | str | Path, allow_pickle: bool) -> Adapter:
    if isinstance(one, Adapter):
        return one
    adapter = load_adapter(one, allow_pickle=allow_pickle)
    return replace(adapter, name=adapter_name(one))


def adapter_name(path: str | Path) -> str:
    """A name for the adapter in a directory: the directory's own, as far as a module can be called so."""
    word = "".join(c if c.isalnum() or c in "_-" else "_" for c in Path(path).resolve().name)
    return word or "default"


def _scaled(adapter: Adapter, weight: float) -> Adapter:
    return adapter if weight == 1.0 else scale(adapter, weight)
