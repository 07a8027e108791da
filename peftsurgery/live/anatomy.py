"""Where the parts of an architecture are: the only file that knows such names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from peftsurgery.errors import NoSiteMatched, listing, nearest
from peftsurgery.live.sites import walk
from peftsurgery.tasks import Task


def output_embeddings(model: nn.Module) -> tuple[str, ...]:
    """The names of the module that turns hidden states into logits; `all-linear` passes over it."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    return tuple(name for name, module in walk(model) if head is not None and module is head)


def heads(model: nn.Module, wanted: Iterable[str] | None, task: Task | None) -> tuple[str, ...]:
    """The full names of the modules that get a trainable copy: the wanted ones and the task's own.

    Like PEFT, which loads what is saved of them, it takes every module whose name ends so: DistilBERT's
    `pre_classifier` with its `classifier`.

    Raises:
        NoSiteMatched: a wanted one that the model has not got.
    """
    names = [name for name, _ in walk(model)]
    implied = task.heads if task is not None else ()
    explicit = [name for word in wanted or () for name in _head(word, names, model)]
    return tuple(name for name in names if name.endswith((*implied, *explicit)))


def _head(word: str, names: list[str], model: nn.Module) -> list[str]:
    found = [name for name in names if name == word or name.endswith(f".{word}")]
    if not found:
        near = nearest(word, names)
        raise NoSiteMatched(
            f"modules_to_save: {word!r} is no module of {type(model).__name__}. Nearest: {listing(near)}. "
            "Nothing was changed.",
            pattern=word,
            nearest=near,
        )
    return found


def label_weights(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The (labels, hidden) weights among an adapter's heads: the last map of a classifier."""
    ends = (".classifier.weight", ".classifier.out_proj.weight", ".score.weight", ".qa_outputs.weight")
    return [tensor for name, tensor in tensors.items() if f".{name}".endswith(ends)]
