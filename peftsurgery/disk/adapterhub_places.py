"""Where AdapterHub puts an adapter: its words for places, and the numbers of the layers that it leaves out."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

from peftsurgery.disk.peft_sites import natural
from peftsurgery.errors import AdapterError, MismatchedTensors, listing

MH, CROSS, FF = "mh_adapter", "cross_adapter", "output_adapter"
ROLES = (MH, FF, CROSS)
DEEPEST = 128
"""A number of layers that no model of AdapterHub's reaches: `leave_out` names what is left out, up to here
where the number of the model's layers is not known."""

ALONE = frozenset({"opt"})
"""Model types whose only list of layers is called a decoder's."""

Stacks = Mapping[str, Mapping[int, frozenset[str]]]
"""For every list of layers, by number, the ends of the names of the sites in it."""


def stacks(names: Iterable[str]) -> Stacks:
    """The sites by list of layers and by layer; encoders in front of decoders.

    Raises:
        MismatchedTensors: a name that is in no layer.
    """
    found: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in sorted(names, key=natural):
        parts = re.fullmatch(r"(.*?(?:\.[0-9]+\.blocks)?)\.([0-9]+)\.(.+)", name)
        if parts is None:
            raise MismatchedTensors(
                f"{name!r} is in no layer, and AdapterHub's adapters are. Save the adapter again.",
                unexpected=[name],
            )
        found[parts[1]][int(parts[2])].add(parts[3])
    ordered = sorted(found, key=lambda stack: _is_decoder(stack))
    return {stack: {layer: frozenset(ends) for layer, ends in found[stack].items()} for stack in ordered}


def role(stack: str, end: str) -> str | None:
    """AdapterHub's word for a place that bottlenecks have; None for a name that is no such place."""
    if re.fullmatch(r"layer\.[0-9]", end):  # T5, whose sublayers have numbers
        sublayer = int(end[-1]) + (0 if _is_decoder(stack) else end != "layer.0")
        return (MH, CROSS, FF)[sublayer] if sublayer < 3 else None
    ends = {
        "cross_attention_adapters": CROSS,
        "attention_adapters": MH,
        "attention.output": MH,
        "crossattention.output": MH,
        "output_adapters": FF,
        "output": FF,
    }
    return next((word for last, word in ends.items() if f".{end}".endswith(f".{last}")), None)


def check_even(found: Stacks, left_out: Collection[int]) -> None:
    """Raise MismatchedTensors where a layer lacks what its neighbours have, or is missing without a word."""
    for stack, layers in found.items():
        every = frozenset[str]().union(*layers.values())
        present = set(layers)
        # a second list's layers are numbered after the first one's
        counted = not (left_out and (len(found) > 1 or _is_half(stack)))
        gaps = set(range(max(present))) - present - (set(left_out) if counted else set(range(max(present))))
        missing = [f"{stack}.{layer}.{end}" for layer in gaps for end in every]
        missing += [f"{stack}.{layer}.{end}" for layer, ends in layers.items() for end in every - ends]
        stray = sorted(present & set(left_out)) if counted else []
        if missing or stray:
            fact = f"lacks {listing(sorted(missing, key=natural))}" if missing else ""
            more = f"holds layer {stray[0]}, which `leave_out` leaves out" if stray else ""
            raise MismatchedTensors(
                f"The adapter's file {' and '.join(filter(None, (fact, more)))}. Save or download it again.",
                missing=missing,
                unexpected=[f"{stack}.{layer}" for layer in stray],
            )


def left_out(found: Stacks, *, is_whole: bool, fills: bool, model_type: str | None) -> list[int]:
    """The numbers of the layers without an adapter, as AdapterHub counts them: a decoder's after the encoder's.

    Args:
        is_whole: whether the deepest layer with an adapter is the model's last.
        fills: whether AdapterHub fills places that the file has no tensors for with what changes nothing.
        model_type: the architecture, where it is known.

    Raises:
        AdapterError: layers differ, or their numbers cannot be told.
    """
    _check_alike(found)
    numbers, offset = [], 0
    for layers in found.values():
        missing = set(range(max(layers) + 1)) - layers.keys()
        numbers += sorted(offset + number for number in missing)
        offset += max(layers) + 1
    is_part = len(found) == 1 or not is_whole
    is_half = model_type not in ALONE and any(map(_is_half, found))
    if is_half and is_part and (numbers or not fills):
        raise AdapterError(
            f"The adapter is in part of the layers of {listing(list(found))}, and AdapterHub numbers a decoder's "
            "layers after the encoder's, whose number the adapter does not say. Put it on all layers of both."
        )
    return numbers if is_whole or fills else [*numbers, *range(offset, DEEPEST)]


def _check_alike(found: Stacks) -> None:
    for stack, layers in found.items():
        every = frozenset[str]().union(*layers.values())
        lone = sorted(end for end in every if any(end not in ends for ends in layers.values()))
        if lone:
            raise AdapterError(
                f"Only some layers of {stack!r} have the adapter at {listing(lone)}, and AdapterHub's format has "
                "the same places in every layer. Put it on all layers alike, or leave whole layers out."
            )


def layer_number(found: Stacks, name: str) -> int:
    """The number of the layer that a site is in, as AdapterHub counts."""
    offset = 0
    for stack, layers in found.items():
        if name.startswith(f"{stack}."):
            return offset + int(name.removeprefix(f"{stack}.").partition(".")[0])
        offset += max(layers) + 1
    raise KeyError(name)


def _is_decoder(stack: str) -> bool:
    return ".decoder." in f".{stack}."


def _is_half(stack: str) -> bool:
    """Whether the stack is one of an encoder-decoder's two: those of encoders alone are called otherwise."""
    return _is_decoder(stack) or f".{stack}".endswith((".encoder.layers", ".encoder.block"))
