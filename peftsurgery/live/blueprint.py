"""What transformers makes of a checkpoint's names, as a plain value: no module, and JSON if need be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from torch import nn

from peftsurgery.live import pretrained
from peftsurgery.live.pretrained import Loading
from peftsurgery.live.sites import sites, ties
from peftsurgery.site import Kind, Layout, Site
from peftsurgery.tasks import Task


@dataclass(frozen=True, slots=True)
class Blueprint:
    """The model that a checkpoint becomes.

    Args:
        architecture: the name of its class.
        classes: `id2label` and `label2id`, where it classifies.
        sites: as `live.sites.sites` lists them.
        state: the names of all its tensors.
        parameters: the names of those that training moves; of tied ones the first.
        ties: groups of names that are one parameter.
        loading: how the checkpoint's names become the model's.
    """

    architecture: str
    classes: Mapping[str, Mapping[str, Any]]
    sites: tuple[Site, ...]
    state: tuple[str, ...]
    parameters: tuple[str, ...]
    ties: tuple[tuple[str, ...], ...]
    loading: Loading

    def to_json(self) -> dict[str, Any]:
        """It as JSON values."""
        told = [{**asdict(s), "kind": s.kind.value, "layout": s.layout.value} for s in self.sites]
        loading = {"names": dict(self.loading.names), "assembled": sorted(self.loading.assembled)}
        return {
            **{
                name: getattr(self, name)
                for name in ("architecture", "classes", "state", "parameters", "ties")
            },
            "sites": told,
            "loading": loading,
        }

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        return cls(
            said["architecture"],
            said["classes"],
            tuple(_site(told) for told in said["sites"]),
            tuple(said["state"]),
            tuple(said["parameters"]),
            tuple(tuple(group) for group in said["ties"]),
            Loading(said["loading"]["names"], frozenset(said["loading"]["assembled"])),
        )


def draw(
    path: Path,
    names: Iterable[str],
    *,
    task: Task | None = None,
    labels: int | None = None,
    trust_remote_code: bool = False,
) -> Blueprint:
    """The blueprint of the model in `path`, whose checkpoint has tensors of these names; no weight is read.

    Raises:
        CheckpointError: its configuration is not understood, or has no class for the task.
    """
    model = pretrained.skeleton(path, task=task, labels=labels, trust_remote_code=trust_remote_code)
    return Blueprint(
        type(model).__name__,
        classes(model),
        tuple(sites(model)),
        tuple(model.state_dict()),
        tuple(name for name, _ in model.named_parameters()),
        tuple(ties(model)),
        pretrained.loading(model, names),
    )


def classes(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What a classifier's config.json calls its classes; nothing for other models."""
    if not type(model).__name__.endswith("Classification"):
        return {}
    config: Any = model.config
    return {
        "id2label": {str(number): label for number, label in config.id2label.items()},
        "label2id": dict(config.label2id),
    }


def _site(told: Mapping[str, Any]) -> Site:
    kind, layout = Kind(told["kind"]), Layout(told["layout"])
    return Site(told["name"], kind, tuple(told["shape"]), layout, told["role"])
