"""Parameters that transformers computes on loading from what a checkpoint holds: stacked experts, split projections."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

Read = Callable[[str], Tensor]
"""From the name of a tensor in the checkpoint to the tensor."""


@dataclass(frozen=True, slots=True, eq=False)
class Assembly:
    """One of transformers' conversions, of some tensors of a checkpoint into some parameters of a model.

    Args:
        converter: transformers' own.
        target: the first parameter that it makes.
        sources: the tensors that it takes, each with the pattern that it takes it by, in transformers' order.
    """

    model: nn.Module
    converter: Any
    target: str
    sources: tuple[tuple[str, str], ...]

    def __call__(self, read: Read) -> dict[str, Tensor]:
        """The parameters by name; tensors on the meta device give their shapes."""
        converter = deepcopy(self.converter)
        for name, pattern in self.sources:
            converter.add_tensor(self.target, name, pattern, partial(read, name))
        made = converter.convert(self.target, model=self.model, config=self.model.config)
        return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}


def assemblies(model: nn.Module, names: Iterable[str]) -> list[Assembly]:
    """What `from_pretrained` would compute of the tensors of these names; only names are looked at."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    known: Any = model
    transforms = get_model_conversion_mapping(known)
    spelled = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    built = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    converters = {pattern: converter for converter in built for pattern in converter.source_patterns}
    state, sources = model.state_dict(), defaultdict[str, list[tuple[str, str]]](list)
    for name in sorted(names, key=dot_natural_key) if built else ():
        live, pattern = rename_source_key(name, spelled, built, known.base_model_prefix, state)
        if pattern is not None and live in state:
            sources[live].append((name, pattern))
    return [
        Assembly(model, converters[taken[0][1]], target, tuple(taken)) for target, taken in sources.items()
    ]
