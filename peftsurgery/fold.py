"""Folding, written once: for every method, every place, every layout, every dtype and every size.

A tensor is folded tile by tile, a tile being some of its stored rows. The grid of tiles is a function of the
tensor's shape alone, and every tile is computed by one thread: so neither how a place cuts its work nor how many
threads share it can change a bit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor

import torch
from torch import Tensor

from peftsurgery.adapter import Adapter
from peftsurgery.changes import BiasChange, Change, Replacement, WeightChange
from peftsurgery.errors import NonFiniteWeight, NotFoldable, UnclaimedSites, listing
from peftsurgery.events import Event, Listener, ignore
from peftsurgery.method import WeightMethod
from peftsurgery.tally import Tally, tally
from peftsurgery.workers import alone, workers

NARROWEST = 16
"""Rows of the smallest tile; a matrix product of fewer may take another path, with other bits."""
TILE = {"cpu": 1 << 18}
"""Elements of a tile: what a core's cache holds."""
DEVICE_TILE = 1 << 24
"""Elements of a tile on an accelerator, which wants few and large operations."""


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
    with workers(torch.get_num_threads()) as pool:
        for name, tensor in tensors:
            if name in folds:
                waiting.discard(name)
                tensor = _fold(name, tensor, folds[name], device, dtype or tensor.dtype, pool)
                listen(Event("fold", name, len(folds) - len(waiting), len(folds), tensor.nbytes))
            yield name, tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
    if waiting:
        raise UnclaimedSites(
            f"The base has no tensor {listing(sorted(waiting))}. Nothing was kept of the merge.",
            sites=sorted(waiting),
        )


def touches(*adapters: Adapter) -> dict[str, tuple[Change, ...]]:
    """For every tensor name that folding changes, what happens to the stored float32 tensor, in order.

    Raises:
        NotFoldable: a method that is not a weight method.
    """
    folds: dict[str, list[Change]] = defaultdict(list)
    for adapter in adapters:
        for name, tensor in adapter.replaced.items():
            folds[name].append(Replacement(tensor))
        for step in adapter.plan.steps:
            if not isinstance(step.method, WeightMethod):
                raise NotFoldable(
                    f"{step.method.name} at {step.site.name!r} changes more than a weight and has no fold. "
                    "Export the model with it instead: `peftsurgery export-onnx MODEL --adapter ADAPTER -o OUT`."
                )
            params = adapter.params[step.site.name]
            folds[step.site.weight].append(WeightChange(step.method, step.site.layout, params))
            if step.method.moves_bias:
                folds[step.site.bias].append(BiasChange(step.method, params))
    return {name: tuple(changes) for name, changes in folds.items()}


def tiles(
    changes: Sequence[Change], shape: Sequence[int], device: str | torch.device = "cpu"
) -> tuple[slice, ...]:
    """The stored rows that are folded together, for a stored tensor of `shape`, in order.

    One tile of everything where some change cannot be cut, or the tensor has no axis. None is narrower than
    `NARROWEST` rows, unless the tensor is.
    """
    rows = shape[0] if shape else 1
    if not shape or any(change.cut(slice(0, rows)) is None for change in changes):
        return (slice(0, rows),)
    wide = max(1, torch.Size(shape).numel() // max(rows, 1))
    most = TILE.get(torch.device(device).type, DEVICE_TILE) // wide
    step = max(NARROWEST, most - most % NARROWEST)
    count = max(1, rows // step)
    return tuple(slice(i * step, rows if i == count - 1 else (i + 1) * step) for i in range(count))


def fold_tile(
    name: str,
    changes: Sequence[Change],
    base: Tensor,
    rows: slice,
    out: Tensor,
    *,
    device: str | torch.device | None = None,
    measure: bool = False,
) -> Tally:
    """Fold one of `tiles`: `base` holds those rows as stored, and the result is rounded once into `out`.

    Args:
        changes: from `touches`, for the whole tensor called `name`.
        rows: where the tile lies in the tensor.
        device: where it is computed; where `base` lies by default.
        measure: tell how far the tile moved, and how far rounding put it off; half as long again.

    Raises:
        NonFiniteWeight: the result, as stored, has a NaN or an infinity.
    """
    start = base.to(device or base.device, working(base.dtype))
    value = start
    for change in changes:
        value = (change.cut(rows) or change)(value)
    out.copy_(value)
    if not _is_finite(value, out):
        raise NonFiniteWeight(
            f"Folding into {name!r} gave NaN or infinite values in {str(out.dtype).removeprefix('torch.')}. "
            "Write a wider dtype (`--dtype float32`), or look at the adapter; nothing was kept.",
            tensor=name,
        )
    return tally(base, start, value, out) if measure and out.is_floating_point() else Tally()


def _is_finite(value: Tensor, out: Tensor) -> bool:
    """Whether `value`, rounded into `out`, has neither NaN nor infinity; no number is larger than the norm of all."""
    if out.is_meta or not out.is_floating_point():
        return True
    return float(torch.linalg.vector_norm(value)) <= torch.finfo(out.dtype).max or bool(
        torch.isfinite(out).all()
    )


def working(dtype: torch.dtype) -> torch.dtype:
    """In what a formula is computed; whole numbers are only ever replaced."""
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype


@torch.inference_mode(False)
@torch.no_grad()
def _fold(
    name: str,
    tensor: Tensor,
    changes: Sequence[Change],
    device: str | torch.device | None,
    dtype: torch.dtype,
    pool: Executor,
) -> Tensor:
    where = torch.device(device or tensor.device)
    changes = [change.held(working(tensor.dtype)) for change in changes]
    result = torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
    grid = tiles(changes, tensor.shape, where)

    @torch.no_grad()
    def fold(rows: slice) -> None:
        some = (tensor[rows], result[rows]) if tensor.ndim else (tensor, result)
        fold_tile(name, changes, some[0], rows, some[1], device=where)

    _spread(fold, grid, pool if where.type == "cpu" and len(grid) > 1 else None)
    return result


def _spread(fold: Callable[[slice], None], grid: Sequence[slice], pool: Executor | None) -> None:
    if pool is not None:
        for _ in pool.map(fold, grid):
            pass
        return
    with alone():
        for rows in grid:
            fold(rows)
