"""Transformers models from a directory: with their weights, or as a skeleton on the meta device."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftsurgery.errors import CheckpointError, listing
from peftsurgery.tasks import Task


def config(path: Path, labels: int | None = None, *, trust_remote_code: bool = False) -> Any:
    """The model's configuration, for `labels` classes where that is given.

    Raises:
        CheckpointError: there is none, it is not understood, or it asks to run code of its own.
    """
    import transformers

    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} has no config.json, so its architecture is unknown. Name a model directory."
        )
    extra = {} if labels is None else {"num_labels": labels}
    try:
        return transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **extra)
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(_why(path, error)) from error


def model_class(config: Any, task: Task | None, *, trust_remote_code: bool = False) -> Any:
    """The class that plays `task` with this configuration; without a task, the one the checkpoint was saved from.

    A checkpoint with a projection keeps it: the task is the same with it on top.

    Raises:
        CheckpointError: the architecture has no such class.
    """
    import transformers

    own = [name for name in config.architectures or () if hasattr(transformers, name)]
    if task is None and own:
        return getattr(transformers, own[0])
    auto = transformers.AutoModel if task is None else getattr(transformers, task.auto)
    found = _mapped(auto, config, trust_remote_code)
    projecting = f"{found.__name__}WithProjection"
    return getattr(transformers, projecting) if projecting in own else found


def load(
    path: Path,
    *,
    task: Task | None = None,
    labels: int | None = None,
    fresh: Collection[str] = (),
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The model in `path`, on the CPU in eval mode.

    Args:
        fresh: modules that need no weights in the checkpoint, because an adapter brings or trains them.
        dtype: that of the weights; the checkpoint's own by default.

    Raises:
        CheckpointError: the checkpoint lacks weights that the model needs, or has them in other shapes.
    """
    found = config(path, labels, trust_remote_code=trust_remote_code)
    cls = model_class(found, task, trust_remote_code=trust_remote_code)
    with _quiet():
        model, info = cls.from_pretrained(
            path,
            config=found,
            dtype=dtype or "auto",
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            ignore_mismatched_sizes=bool(fresh),  # a head that an adapter brings may have labels of its own
        )
    _check_sizes(path, info["mismatched_keys"], fresh)
    check_complete(path, cls.__name__, [name for name in info["missing_keys"] if not inside(name, fresh)])
    return model.eval()  # type: ignore[no-any-return]


def _check_sizes(path: Path, wrong: Iterable[tuple[str, Any, Any]], fresh: Collection[str]) -> None:
    for name, stored, wanted in wrong:
        if not inside(name, fresh):
            raise CheckpointError(
                f"{path} holds {name!r} as {tuple(stored)}, and the model has it as {tuple(wanted)}. "
                "Correct config.json; nothing was written."
            )


def check_complete(path: Path, cls: str, lost: Collection[str]) -> None:
    """Refuse a checkpoint that lacks what its model needs.

    Raises:
        CheckpointError: something is lost.
    """
    if lost:
        raise CheckpointError(
            f"{path} lacks {listing(sorted(lost))}, which {cls} needs, and random weights are no answer. "
            "Take the checkpoint or the adapter that holds them, or another `--task`."
        )


def skeleton(
    path: Path, *, task: Task | None = None, labels: int | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """The model's tree on the meta device: names, shapes and ties, no weight read."""
    found = config(path, labels, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        return built(found, task, trust_remote_code=trust_remote_code)


def built(config: Any, task: Task | None, *, trust_remote_code: bool = False) -> nn.Module:
    """A model that no weights were read for; where its tensors lie is the caller's context."""
    cls = model_class(config, task, trust_remote_code=trust_remote_code)
    with _quiet():
        model = cls(config) if not hasattr(cls, "_model_mapping") else cls.from_config(config)
    model.tie_weights()
    return model.eval()  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Loading:
    """How transformers turns a checkpoint's tensors into a model's parameters.

    Args:
        names: the checkpoint's names → the model's; old spellings (`gamma`) and prefixes are resolved.
        assembled: parameters that are computed from several tensors, or from one by more than its name.
    """

    names: Mapping[str, str]
    assembled: frozenset[str]


def loading(model: nn.Module, names: Iterable[str]) -> Loading:
    """What `from_pretrained` would make of these names; only names are looked at."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    pretrained: Any = model
    transforms = get_model_conversion_mapping(pretrained)
    spelled = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    built = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    state = model.state_dict()
    found = {
        name: rename_source_key(name, spelled, built, pretrained.base_model_prefix, state) for name in names
    }
    assembled = frozenset(live for live, pattern in found.values() if pattern is not None)
    return Loading({name: live for name, (live, _) in found.items()}, assembled)


def _mapped(auto: Any, config: Any, trust_remote_code: bool) -> Any:
    if trust_remote_code and getattr(config, "auto_map", None):
        return auto
    cls = auto._model_mapping.get(type(config), None)
    if cls is None:
        raise CheckpointError(
            f"{config.model_type!r} has no {auto.__name__}. Give a `--task` that this model plays."
        )
    return cls[0] if isinstance(cls, tuple | list) else cls


def inside(name: str, modules: Collection[str]) -> bool:
    """Whether a parameter is one of these modules', of whatever model they are a part."""
    return any(f".{module}." in f".{name}." for module in modules)


def _why(path: Path, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return (
            f"{path} brings Python code of its own, which peftsurgery does not run unasked. Read it, "
            "then repeat with `--trust-remote-code`."
        )
    return f"{path}/config.json is not understood: {str(error).splitlines()[0]}. Check `model_type`."


@contextmanager
def _quiet() -> Iterator[None]:
    """Transformers prints bars and load reports of its own; ours says what matters."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
