"""Every error of the project. A message is one sentence of fact and one of remedy.

SurgeryError
├── PlanError        nothing has been touched
│   ├── NoSiteMatched      .pattern .nearest
│   ├── UnsupportedSite    .site
│   ├── AlreadyGrafted     .name
│   ├── TiedSites          .names
│   └── InputTooLong       .length .limit
├── AdapterError     the adapter cannot be understood
│   ├── UnknownMethod
│   ├── MismatchedTensors  .missing .unexpected
│   └── UntrustedPickle
├── CheckpointError  the files are not what they say
│   ├── TruncatedShard
│   ├── MissingShard
│   ├── UnsafePath
│   └── DiskError          .fact .remedy
├── FoldError        it cannot be absorbed
│   ├── NotFoldable
│   ├── NonFiniteWeight    .tensor
│   └── UnclaimedSites     .sites .nearest
├── FleetError       some adapters of many could not be merged, and the others were: .report
└── ExportError      it cannot be exported, or the export is not the model
    ├── UnsupportedModel
    ├── NotReferable       .reason
    ├── PlacementError     .report
    └── ParityError        .max_abs_diff .tolerance .output
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class SurgeryError(Exception):
    """Root of every error that peftsurgery raises on purpose; another process can be sent it whole."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), self.args, self.__dict__)


def _again(kind: type[SurgeryError], words: tuple[object, ...], known: Mapping[str, object]) -> SurgeryError:
    error = kind.__new__(kind, *words)
    error.__dict__.update(known)
    return error


class PlanError(SurgeryError):
    """The plan does not fit the model; nothing has been touched."""


class NoSiteMatched(PlanError):
    """A pattern, an exclusion or a layer index that selects nothing."""

    def __init__(self, message: str, *, pattern: str, nearest: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.pattern = pattern
        self.nearest = tuple(nearest)


class UnsupportedSite(PlanError):
    """A named place that cannot carry the method."""

    def __init__(self, message: str, *, site: str) -> None:
        super().__init__(message)
        self.site = site


class AlreadyGrafted(PlanError):
    """An adapter of that name is already on the model."""

    def __init__(self, message: str, *, name: str) -> None:
        super().__init__(message)
        self.name = name


class TiedSites(PlanError):
    """A weight that several names share would be folded behind its twin's back."""

    def __init__(self, message: str, *, names: Sequence[str]) -> None:
        super().__init__(message)
        self.names = tuple(names)


class InputTooLong(PlanError):
    """An input that leaves no room for the virtual tokens among the model's positions."""

    def __init__(self, message: str, *, length: int, limit: int) -> None:
        super().__init__(message)
        self.length = length
        self.limit = limit


class AdapterError(SurgeryError):
    """The adapter cannot be understood."""


class UnknownMethod(AdapterError):
    """A method, or an option of one, that peftsurgery does not implement."""


class MismatchedTensors(AdapterError):
    """The adapter's tensors are not the ones its configuration announces."""

    def __init__(self, message: str, *, missing: Sequence[str] = (), unexpected: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)


class UntrustedPickle(AdapterError):
    """A pickle that the caller did not ask to trust."""


class CheckpointError(SurgeryError):
    """The files are not what they say."""


class TruncatedShard(CheckpointError):
    """A safetensors file that is shorter, or stranger, than its header says."""


class MissingShard(CheckpointError):
    """A file that the index names and the directory lacks."""


class UnsafePath(CheckpointError):
    """A path inside a checkpoint that leaves its directory."""


class DiskError(CheckpointError):
    """The disk, and not what lies on it: full, failing, or out of reach. The same again may succeed."""

    def __init__(self, fact: str, remedy: str, kept: str = "nothing was kept") -> None:
        super().__init__(fact, remedy, kept)
        self.fact = fact
        self.remedy = remedy
        self.kept = kept

    def __str__(self) -> str:
        return f"{self.fact}. {self.remedy}; {self.kept}."


class FoldError(SurgeryError):
    """The adapter cannot be absorbed into the base."""


class NotFoldable(FoldError):
    """The method has no fold: it is exported as it is."""


class NonFiniteWeight(FoldError):
    """A NaN or an infinity, in the adapter or in what folding gave."""

    def __init__(self, message: str, *, tensor: str) -> None:
        super().__init__(message)
        self.tensor = tensor


class UnclaimedSites(FoldError):
    """Sites of the adapter that no tensor of the base answers to."""

    def __init__(self, message: str, *, sites: Sequence[str], nearest: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.sites = tuple(sites)
        self.nearest = tuple(nearest)


class FleetError(SurgeryError):
    """Some adapters of many could not be merged, and the others were; `merge` has its whole report at `report`."""

    def __init__(self, message: str, *, report: object) -> None:
        super().__init__(message)
        self.report = report


class ExportError(SurgeryError):
    """The model cannot be exported, or the export is not the model."""


class UnsupportedModel(ExportError):
    """An architecture or task without an export."""


class NotReferable(ExportError):
    """The weights lie in no file as the model computes with them, so that a graph could read them there."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}. Export with `--weights copy`; nothing was written.")
        self.reason = reason


class PlacementError(ExportError):
    """A node that computes would run beside the GPU; the report at `report` has them all."""

    def __init__(self, message: str, *, report: object) -> None:
        super().__init__(message)
        self.report = report


class ParityError(ExportError):
    """What runs is not what was trained; `verify` has its whole report at `report`."""

    def __init__(
        self, message: str, *, max_abs_diff: float, tolerance: float, output: str, report: object = None
    ) -> None:
        super().__init__(message)
        self.report = report
        self.max_abs_diff = max_abs_diff
        self.tolerance = tolerance
        self.output = output


def nearest(word: str, names: Iterable[str], count: int = 3) -> tuple[str, ...]:
    """The `count` names most like `word`, best first; last name components are compared too."""
    whole = list(dict.fromkeys(names))
    tails: dict[str, str] = {}
    for name in whole:
        tails.setdefault(name.rsplit(".", 1)[-1], name)
    close = difflib.get_close_matches(word, tails, n=count, cutoff=0.5)
    return tuple(close or difflib.get_close_matches(word, whole[:2000], n=count, cutoff=0.3))


def listing(names: Sequence[str], limit: int = 4) -> str:
    """`'a', 'b', 'c' and 9 more`: names for a message, never thousands of them."""
    shown = ", ".join(repr(name) for name in names[:limit])
    rest = len(names) - limit
    return f"{shown} and {rest} more" if rest > 0 else shown


def cause(error: BaseException) -> str:
    """The first line of what went wrong first: torch wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
