"""Adapters from and to directories, whose format is told here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from peftsurgery.adapter import Adapter, check, scale
from peftsurgery.disk import adapterhub, peft
from peftsurgery.disk.durable import staged
from peftsurgery.disk.locate import locate
from peftsurgery.errors import AdapterError, PlanError, listing
from peftsurgery.methods import METHODS

Adapters = Adapter | str | Path | Sequence[Adapter | str | Path]

PEFT, ADAPTERHUB = "peft", "adapterhub"
WRITERS: Mapping[str, Callable[[Adapter, Path], None]] = {PEFT: peft.write, ADAPTERHUB: adapterhub.write}


def load_adapter(path: str | Path, *, name: str | None = None, allow_pickle: bool = False) -> Adapter:
    """The adapter in a directory, in PEFT's file format or in AdapterHub's, every tensor checked.

    Args:
        path: the directory, or a hub id in the local cache; of AdapterHub's an adapter, a fusion or a set-up.
        name: what it will be called on a model; what its files call it by default, which PEFT's do not.
        allow_pickle: read a `.bin` where there is no `.safetensors` (with `weights_only=True`).

    Raises:
        UnknownMethod, MismatchedTensors, NonFiniteWeight, UntrustedPickle, AdapterError.
    """
    return _read(path, name, allow_pickle).held()


def _read(path: str | Path, name: str | None, allow_pickle: bool) -> Adapter:
    """The adapter; what is folded tensor by tensor stays in its file until it is needed."""
    found = locate(path)
    if adapterhub.is_here(found):
        return adapterhub.read(found, METHODS, name=name, allow_pickle=allow_pickle)
    return peft.read(found, METHODS, name=name or "default", allow_pickle=allow_pickle)


def save_adapter(adapter: Adapter, out: str | Path, *, format: str | None = None) -> Path:
    """Write the adapter as a directory that PEFT or AdapterHub's library loads; all of it or nothing.

    Args:
        format: `peft` or `adapterhub`; by default PEFT's, where it can say the adapter.

    Raises:
        AdapterError: the format is not known, or cannot say the adapter.
        CheckpointError: `out` is not empty, or cannot be written.
    """
    word = format or format_of(adapter)
    if word not in WRITERS:
        raise AdapterError(
            f"{word!r} is no adapter format that peftsurgery writes. Take one of {listing(list(WRITERS))}."
        )
    with staged(Path(out)) as directory:
        WRITERS[word](adapter, directory)
    return Path(out)


def format_of(adapter: Adapter) -> str:
    """The format that an adapter is written in unless another is asked for."""
    sayable = all(step.method.peft_type is not None for step in adapter.plan.steps)
    return PEFT if sayable and adapter.reading.position_shift else ADAPTERHUB


def is_adapter(path: str | Path) -> bool:
    """Whether a path is an adapter's directory, in any format."""
    return (Path(path) / peft.CONFIG).is_file() or adapterhub.is_here(Path(path))


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """An adapter as a command was given it.

    Args:
        adapter: what its files hold.
        weight: the factor of its effect.
        path: its directory, where it has one.
    """

    adapter: Adapter
    weight: float = 1.0
    path: Path | None = None

    @property
    def files(self) -> dict[str, Path]:
        """The safetensors files that it came from, by what they are called in and beside its directory."""
        if self.path is None:
            return {}
        folders = adapterhub.folders(self.path)
        found = [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]
        return {_called(file, self.path): file for file in found}

    @property
    def scaled(self) -> Adapter:
        """The adapter with that effect.

        Raises:
            NotFoldable: its method has no scale.
        """
        return self.adapter if self.weight == 1.0 else scale(self.adapter, self.weight)


def given(adapters: Adapters, weight: Sequence[float] = (), *, allow_pickle: bool = False) -> list[Given]:
    """Adapters in whatever form they were given, checked; what is folded by tensors stays in its file until then.

    Raises:
        MismatchedTensors, NonFiniteWeight, AdapterError: one is not whole.
        PlanError: there are more weights than adapters, or none of the latter.
    """
    listed = [adapters] if isinstance(adapters, Adapter | str | Path) else list(adapters)
    if not listed or len(weight) not in (0, len(listed)):
        raise PlanError(
            f"{len(listed)} adapters come with {len(weight)} weights. Give every adapter one `--weight`, or none."
        )
    weights = weight or [1.0] * len(listed)
    return [
        Given(_loaded(one, allow_pickle), by, None if isinstance(one, Adapter) else locate(one))
        for one, by in zip(listed, weights, strict=True)
    ]


def gather(adapters: Adapters, weight: Sequence[float] = (), *, allow_pickle: bool = False) -> list[Adapter]:
    """Adapters in whatever form they were given, in memory and scaled; see `given`."""
    return [one.scaled.held() for one in given(adapters, weight, allow_pickle=allow_pickle)]


def _called(file: Path, directory: Path) -> str:
    return file.name if file.parent == directory else f"{file.parent.name}/{file.name}"


def _loaded(one: Adapter | str | Path, allow_pickle: bool) -> Adapter:
    if isinstance(one, Adapter):
        return check(one)
    adapter = _read(one, None, allow_pickle)
    return adapter if adapterhub.is_here(locate(one)) else replace(adapter, name=adapter_name(one))


def adapter_name(path: str | Path) -> str:
    """A name for the adapter in a directory: the directory's own, as far as a module can be called so."""
    word = "".join(c if c.isalnum() or c in "_-" else "_" for c in Path(path).resolve().name)
    return word or "default"
