"""Folding, written once: for every method, every place, every layout and every dtype."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from peftsurgery.adapter import Adapter
from peftsurgery.errors import NonFiniteWeight, NotFoldable, UnclaimedSites, listing
from peftsurgery.events import Event, Listener, ignore
from peftsurgery.method import Map, Params, WeightMethod
from peftsurgery.site import Layout


def folded(
    tensors: Iterable[tuple[str, Tensor]],
    *adapters: Adapter,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    listen: Listener = ignore,
) -> Iterator[tuple[str, Tensor]]:
    """The stream of `tensors` with every adapter absorbed, in the same order; one tensor at a time.

    A touched tensor is computed in float32 on `device` (or where it lies) and rounded once, to its own dtype or to
    `dtype`; an untouched one passes through (cast to `dtype` where that is given). Several adapters
    are summed before the one rounding.

    Raises:
        NotFoldable: a method that is not a weight method.
        NonFiniteWeight: folding gave a NaN or an infinity.
        UnclaimedSites: at the end of the stream, for the tensors that did not come by.
    """
    folds = touches(*adapters)
    waiting = set(folds)
    for name, tensor in tensors:
        if name in folds:
            waiting.discard(name)
            tensor = _fold(name, tensor, folds[name], device, dtype or tensor.dtype)
            listen(Event("fold", name, len(folds) - len(waiting), len(folds), tensor.nbytes))
        yield name, tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
    if waiting:
        raise UnclaimedSites(
            f"The base has no tensor {listing(sorted(waiting))}. Nothing was kept of the merge.",
            sites=sorted(waiting),
        )


def touches(*adapters: Adapter) -> dict[str, list[Map]]:
    """For every tensor name that folding changes, the functions of the stored float32 tensor, in order.

    Raises:
        NotFoldable: a method that is not a weight method.
    """
    folds: dict[str, list[Map]] = defaultdict(list)
    for adapter in adapters:
        for name, tensor in adapter.replaced.items():
            folds[name].append(partial(_replaced, tensor))
        for step in adapter.plan.steps:
            if not isinstance(step.method, WeightMethod):
                raise NotFoldable(
                    f"{step.method.name} at {step.site.name!r} changes more than a weight and has no fold. "
                    "Export the model with it instead: `peftsurgery export-onnx MODEL --adapter ADAPTER -o OUT`."
                )
            params = adapter.params[step.site.name]
            folds[step.site.weight].append(partial(_weight, step.method, step.site.layout, params))
            if step.method.moves_bias:
                folds[step.site.bias].append(partial(_bias, step.method, params))
    return dict(folds)


def _weight(method: WeightMethod, layout: Layout, params: Params, tensor: Tensor) -> Tensor:
    near = {name: p.to(tensor) for name, p in params.items()}
    return layout.stored(method.fold(layout.matrix(tensor), near), tuple(tensor.shape))


def _bias(method: WeightMethod, params: Params, tensor: Tensor) -> Tensor:
    return method.fold_bias(tensor, {name: p.to(tensor) for name, p in params.items()})


def _replaced(value: Tensor, tensor: Tensor) -> Tensor:
    return value.to(tensor)


@torch.no_grad()
def _fold(
    name: str, tensor: Tensor, folds: list[Map], device: str | torch.device | None, dtype: torch.dtype
) -> Tensor:
    value = tensor.to(device or tensor.device, torch.promote_types(tensor.dtype, torch.float32))
    for fold in folds:
        value = fold(value)
    result = value.to(dtype).to(tensor.device).contiguous()
    if not result.is_meta and not torch.isfinite(result).all():
        raise NonFiniteWeight(
            f"Folding into {name!r} gave NaN or infinite values in {str(dtype).removeprefix('torch.')}. "
            "Write a wider dtype (`--dtype float32`), or look at the adapter; nothing was kept.",
            tensor=name,
        )
    return result
