"""What goes into a graph and what comes out, under the names that PEFT and optimum use."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftsurgery.dtypes import DTYPES
from peftsurgery.errors import UnsupportedModel, cause, listing
from peftsurgery.graph import cache
from peftsurgery.graph.limits import begins_with, longest_of
from peftsurgery.graph.posture import blind
from peftsurgery.tasks import TASKS, Task, task_of
from peftsurgery.tasks import task as task_named

BATCH, LENGTH, PAST_LENGTH = "batch_size", "sequence_length", "past_sequence_length"
TOTAL = f"{PAST_LENGTH} + {LENGTH}"
"""The tokens seen so far and the new ones: how long a mask is, and what comes out of a cache."""
WRITTEN, BEFORE, SOURCE = "decoder_sequence_length", "past_decoder_sequence_length", "encoder_sequence_length"
"""The same of an encoder-decoder: what its decoder reads and has read, and the source text."""
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
PIXELS, TARGET = "pixel_values", "decoder_input_ids"
CACHED_INPUTS = ("input_ids", "attention_mask", "position_ids")
GENERATION, SEQ2SEQ = "text-generation", "text2text-generation"
OUTPUTS: Mapping[str, Mapping[str, bool]] = {
    "sequence-classification": {"logits": False},
    "token-classification": {"logits": True},
    "question-answering": {"start_logits": True, "end_logits": True},
    "fill-mask": {"logits": True},
    "image-classification": {"logits": False},
    GENERATION: {"logits": True},
    SEQ2SEQ: {"encoder_last_hidden_state": True, "logits": False},
    "feature-extraction": {
        "text_embeds": False,
        "image_embeds": False,
        "last_hidden_state": True,
        "pooler_output": False,
    },
}
"""For each task, its outputs, and whether there is one for every token."""
TYPES = {"int64": torch.int64, **DTYPES}
"""The dtypes of ports by their words."""
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
    def torch_dtype(self) -> torch.dtype:
        """Its dtype, in torch."""
        return TYPES[self.dtype]

    @property
    def per_token(self) -> bool:
        """Whether it has a value for every token, virtual ones included, so that padding matters."""
        return self.token_axis is not None

    @property
    def token_axis(self) -> int | None:
        """The axis that counts tokens, those of the past included."""
        axes = (i for i, axis in enumerate(self.axes) if str(axis).startswith((LENGTH, PAST_LENGTH)))
        return next(axes, None)


@dataclass(frozen=True, slots=True)
class Signature:
    """The inputs and outputs of a model for a task, and what makes an input a fair one.

    Args:
        task: the word for it in `peftsurgery.tasks`.
        vocab_size: token ids lie in [0, vocab_size).
        pad_id: the token id of padding, 0 where the model names none.
        type_vocab_size: token type ids lie in [0, type_vocab_size).
        longest: the longest input that has positions; 0 where there is no bound.
        start_id: what the decoder of an encoder-decoder begins with.
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    task: str
    vocab_size: int = 2
    pad_id: int = 0
    type_vocab_size: int = 1
    longest: int = 0
    start_id: int = 0

    @property
    def sees(self) -> bool:
        """Whether it takes images, of the one size that its input says."""
        return self.inputs[0].name == PIXELS


def signature(model: nn.Module, task: str | None = None) -> Signature:
    """The signature of a transformers model; it is run once, on two short rows of tokens or two images.

    For text generation the keys and values of the tokens seen before go in and come out, so that one graph
    serves the prompt and every token after it.

    Args:
        task: a word for the task; by default what the class is for.

    Raises:
        UnsupportedModel: the model takes neither tokens nor pixels alone, or does not play the task.
        PlanError: no task is called so.
    """
    sees = _sees(model)
    config: Any = model.config if sees else _config(model)
    said = _task(model, task)
    _check_halves(model, config, said)
    cached = said.name == GENERATION
    if cached:
        _check_causal(model, config)
    ports = _pixels(model) if sees else _tokens(model, cached)
    given = _probe(model, ports, cached)
    past, present = _cache_ports(given) if cached else ((), ())
    pad = getattr(config, "pad_token_id", None) or 0
    return Signature(
        inputs=ports + past,
        outputs=tuple(
            _port(name, given[name], _dynamic(said, sees, per_token))
            for name, per_token in _offered(model, said, given)
        )
        + present,
        task=said.name,
        vocab_size=getattr(config, "vocab_size", 0),
        pad_id=pad,
        type_vocab_size=_types(config),
        longest=longest_of(model),
        start_id=begins_with(model, pad) if said.name == SEQ2SEQ else 0,
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
    dtype = dtype_of(next(p for p in model.parameters() if p.is_floating_point()))
    axes = (BATCH, getattr(config, "num_channels", 3), height, width)
    return (Port(PIXELS, dtype, axes),)


def _tokens(model: nn.Module, cached: bool) -> tuple[Port, ...]:
    config, accepted = _config(model), inspect.signature(model.forward).parameters
    offered = CACHED_INPUTS if cached else INPUTS
    names = [n for n in offered if n in accepted and (n != "token_type_ids" or _types(config) > 1)]
    seen = TOTAL if cached else LENGTH
    target = (Port(TARGET, "int64", (BATCH, WRITTEN)),) if config.is_encoder_decoder else ()
    return tuple(Port(n, "int64", (BATCH, seen if n == "attention_mask" else LENGTH)) for n in names) + target


def _types(config: Any) -> int:
    return getattr(config, "type_vocab_size", 2)


def call(model: nn.Module, feeds: Mapping[str, Tensor]) -> Mapping[str, Any]:
    """The model's outputs by name; keys and values come out where they went in."""
    if cache.is_cached(feeds):
        own = {name: tensor for name, tensor in feeds.items() if not cache.is_cached([name])}
        given = model(**own, past_key_values=cache.of(feeds), use_cache=True, return_dict=True)
        return {"logits": given["logits"], **cache.named(given["past_key_values"])}
    without = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    return model(**feeds, **without, return_dict=True)  # type: ignore[no-any-return]


def _config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    if config is None or not isinstance(getattr(config, "vocab_size", None), int):
        raise UnsupportedModel(f"{_name(model)} is not a transformers model over tokens. {_supported()}")
    if "input_ids" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModel(f"{_name(model)} takes no input_ids. {_supported()}")
    return config


def _check_halves(model: nn.Module, config: Any, task: Task) -> None:
    """Encoder-decoders generate text from text, and nothing else does."""
    is_two = bool(getattr(config, "is_encoder_decoder", False))
    if is_two != (task.name == SEQ2SEQ):
        what = "an encoder with a decoder" if is_two else "no encoder with a decoder"
        raise UnsupportedModel(
            f"{_name(model)} is {what}, and cannot be exported for {task.name}. {_supported()}"
        )


def _check_causal(model: nn.Module, config: Any) -> None:
    """Refuse what generates by its class's name only: BERT's tokens see those after them, unless told otherwise."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    if config.model_type in MASKED and not getattr(config, "is_decoder", False):
        raise UnsupportedModel(
            f"{_name(model)} is no decoder: its tokens see those after them. Load it with `is_decoder=True`, "
            "or export it for another task."
        )


def _task(model: nn.Module, word: str | None) -> Task:
    found = task_of(type(model).__name__) if word is None else task_named(word)
    if found is None or found.name not in OUTPUTS:
        what = (
            "has no task" if found is None else f"would be exported for {found.name}, which is not supported"
        )
        raise UnsupportedModel(f"{_name(model)} {what}. {_supported()}")
    return found


def _probe(model: nn.Module, ports: tuple[Port, ...], cached: bool) -> Mapping[str, Any]:
    device = next(model.parameters()).device
    sizes = {BATCH: 2, LENGTH: PROBED, TOTAL: PROBED, WRITTEN: PROBED}
    feeds = {
        port.name: torch.full(
            [axis if isinstance(axis, int) else sizes[axis] for axis in port.axes],
            int(port.name != "token_type_ids"),
            dtype=port.torch_dtype,
            device=device,
        )
        for port in ports
    }
    try:
        with blind(model):
            return model(**feeds, use_cache=True, return_dict=True) if cached else call(model, feeds)
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


def _cache_ports(given: Mapping[str, Any]) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """What goes into the cache and what comes out, after the keys and values that a call gave."""
    past = cache.named(given["past_key_values"], cache.PAST).items()
    present = cache.named(given["past_key_values"]).items()
    return (
        tuple(Port(n, dtype_of(t), (BATCH, t.shape[1], PAST_LENGTH, t.shape[3])) for n, t in past),
        tuple(Port(n, dtype_of(t), (BATCH, t.shape[1], TOTAL, t.shape[3])) for n, t in present),
    )


def dtype_of(tensor: Tensor) -> str:
    """A port's word for the dtype of a tensor."""
    return str(tensor.dtype).removeprefix("torch.")


def _dynamic(task: Task, sees: bool, per_token: bool) -> tuple[str, ...]:
    """The axes of an output that have no fixed size."""
    if per_token:
        return (BATCH,) if sees else (BATCH, LENGTH)
    return (BATCH, WRITTEN) if task.name == SEQ2SEQ else (BATCH,)


def _port(name: str, value: Tensor, dynamic: tuple[str, ...]) -> Port:
    """Where virtual tokens come out too, the axis of the tokens says so: `sequence_length + 20`."""
    lengths = zip(dynamic[1:], value.shape[1:], strict=False)
    named = (f"{axis} + {size - PROBED}" if size > PROBED else axis for axis, size in lengths)
    return Port(name, dtype_of(value), (BATCH, *named, *value.shape[len(dynamic) :]))


def _name(model: nn.Module) -> str:
    return type(model).__name__


def _supported() -> str:
    words = [task.name for task in TASKS if task.name in OUTPUTS]
    return f"Models of text and images can be exported for {listing(words, len(words))}."
