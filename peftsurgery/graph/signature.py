"""What goes into a graph and what comes out, under the names that PEFT and optimum use."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftsurgery.errors import UnsupportedModel, listing
from peftsurgery.graph.posture import evaluating
from peftsurgery.tasks import TASKS, Task, task_of
from peftsurgery.tasks import task as task_named

BATCH, LENGTH = "batch_size", "sequence_length"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
PIXELS = "pixel_values"
OUTPUTS: Mapping[str, Mapping[str, bool]] = {
    "sequence-classification": {"logits": False},
    "token-classification": {"logits": True},
    "question-answering": {"start_logits": True, "end_logits": True},
    "fill-mask": {"logits": True},
    "image-classification": {"logits": False},
    "feature-extraction": {
        "text_embeds": False,
        "image_embeds": False,
        "last_hidden_state": True,
        "pooler_output": False,
    },
}
"""For each task, its outputs, and whether there is one for every token."""
RECORDED = "peftsurgery."
"""How the keys begin under which a graph keeps what its ports do not say."""
PROBED = 3
"""How many tokens the rows have on which a model is run to see what it gives."""
OPTIONAL = frozenset({"text_embeds", "image_embeds", "pooler_output"})


@dataclass(frozen=True, slots=True)
class Port:
    """One input or output.

    Args:
        name: its name in the graph.
        dtype: `int64`, `float32`, `float16` or `bfloat16`.
        axes: for each axis its name, where it is dynamic, or its size.
    """

    name: str
    dtype: str
    axes: tuple[str | int, ...]

    @property
    def per_token(self) -> bool:
        """Whether it has a value for every token, virtual ones included, so that padding matters."""
        return any(str(axis).startswith(LENGTH) for axis in self.axes)


@dataclass(frozen=True, slots=True)
class Signature:
    """The inputs and outputs of a model for a task, and what makes an input a fair one.

    Args:
        task: the word for it in `peftsurgery.tasks`.
        vocab_size: token ids lie in [0, vocab_size).
        pad_id: the token id of padding, 0 where the model names none.
        type_vocab_size: token type ids lie in [0, type_vocab_size).
        longest: the longest input that has positions; 0 where there is no bound.
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    task: str
    vocab_size: int = 2
    pad_id: int = 0
    type_vocab_size: int = 1
    longest: int = 0


def signature(model: nn.Module, task: str | None = None) -> Signature:
    """The signature of a transformers encoder; the model is run once, on two short rows of tokens or two images.

    Args:
        task: a word for the task; by default what the class is for.

    Raises:
        UnsupportedModel: the model is no encoder over tokens or pixels, or does not play the task.
        PlanError: no task is called so.
    """
    sees = _sees(model)
    ports = _pixels(model) if sees else _tokens(model)
    said, config, given = _task(model, task), cast(Any, model.config), _probe(model, ports)
    pad = getattr(config, "pad_token_id", None) or 0
    return Signature(
        inputs=ports,
        outputs=tuple(
            _port(name, given[name], per_token and not sees)
            for name, per_token in _offered(model, said, given)
        ),
        task=said.name,
        vocab_size=getattr(config, "vocab_size", 0),
        pad_id=pad,
        type_vocab_size=_types(config),
        longest=longest(getattr(config, "max_position_embeddings", None), pad),
    )


def _sees(model: nn.Module) -> bool:
    """Whether the model takes pixels alone."""
    accepted = inspect.signature(model.forward).parameters
    return PIXELS in accepted and "input_ids" not in accepted and hasattr(model, "config")


def _pixels(model: nn.Module) -> tuple[Port, ...]:
    """An image as the configuration says it; transformers interpolates positions for no other unasked."""
    config: Any = model.config
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    axes = (BATCH, getattr(config, "num_channels", 3), height, width)
    return (Port(PIXELS, str(dtype).removeprefix("torch."), axes),)


def _tokens(model: nn.Module) -> tuple[Port, ...]:
    config, accepted = _config(model), inspect.signature(model.forward).parameters
    names = [n for n in INPUTS if n in accepted and (n != "token_type_ids" or _types(config) > 1)]
    return tuple(Port(name, "int64", (BATCH, LENGTH)) for name in names)


def _types(config: Any) -> int:
    return getattr(config, "type_vocab_size", 2)


def longest(positions: int | None, pad_id: int) -> int:
    """The longest input for so many positions; 0 where there is no bound."""
    # RoBERTa's positions start after the padding's id, so its last ones are out of reach.
    return max(0, (positions or 0) - pad_id - 1)


def call(model: nn.Module, feeds: Mapping[str, Tensor]) -> Mapping[str, Any]:
    """The model's outputs by name, without a cache of keys and values."""
    cache = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    return model(**feeds, **cache, return_dict=True)  # type: ignore[no-any-return]


def cause(error: BaseException) -> str:
    """The first line of what went wrong first: torch wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


def _config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    if config is None or not isinstance(getattr(config, "vocab_size", None), int):
        raise UnsupportedModel(f"{_name(model)} is not a transformers model over tokens. {_supported()}")
    if "input_ids" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModel(f"{_name(model)} takes no input_ids. {_supported()}")
    if config.is_encoder_decoder or _decodes(config):
        raise UnsupportedModel(f"{_name(model)} is a decoder, or has one. {_supported()}")
    return config


def _decodes(config: Any) -> bool:
    """Whether tokens see only what is before them: transformers knows such models as causal only."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED,
    )

    kind = config.model_type
    return bool(getattr(config, "is_decoder", False)) or (kind in CAUSAL and kind not in MASKED)


def _task(model: nn.Module, word: str | None) -> Task:
    found = task_of(type(model).__name__) if word is None else task_named(word)
    if found is None or found.name not in OUTPUTS:
        what = (
            "has no task" if found is None else f"would be exported for {found.name}, which is not supported"
        )
        raise UnsupportedModel(f"{_name(model)} {what}. {_supported()}")
    return found


def _probe(model: nn.Module, ports: tuple[Port, ...]) -> Mapping[str, Any]:
    device = next(model.parameters()).device
    sizes = {BATCH: 2, LENGTH: PROBED}
    feeds = {
        port.name: torch.full(
            [axis if isinstance(axis, int) else sizes[axis] for axis in port.axes],
            int(port.name != "token_type_ids"),
            dtype=getattr(torch, port.dtype),
            device=device,
        )
        for port in ports
    }
    try:
        with evaluating(model):
            return call(model, feeds)
    except Exception as error:  # whatever the model's own code raises
        raise UnsupportedModel(
            f"{_name(model)} does not run on plain input: {cause(error)}. Make it work in torch first."
        ) from error


def _offered(model: nn.Module, task: Task, given: Mapping[str, Any]) -> list[tuple[str, bool]]:
    wanted = OUTPUTS[task.name]
    lost = [name for name in wanted if given.get(name) is None and name not in OPTIONAL]
    if lost:
        raise UnsupportedModel(
            f"{_name(model)} gives {listing(list(given))} and not {listing(lost)}, which {task.name} "
            f"is about. Load the model with `{task.auto}`, or name the task that it was made for."
        )
    return [(name, per_token) for name, per_token in wanted.items() if given.get(name) is not None]


def _port(name: str, value: Tensor, per_token: bool) -> Port:
    dynamic = (BATCH, _length(value.shape[1] - PROBED)) if per_token else (BATCH,)
    return Port(name, str(value.dtype).removeprefix("torch."), (*dynamic, *value.shape[len(dynamic) :]))


def _length(more: int) -> str:
    """The axis of the tokens, where virtual ones come out too: `sequence_length + 20`."""
    return f"{LENGTH} + {more}" if more else LENGTH


def _name(model: nn.Module) -> str:
    return type(model).__name__


def _supported() -> str:
    words = [task.name for task in TASKS if task.name in OUTPUTS]
    return f"Encoders of text and images can be exported for {listing(words, len(words))}."
