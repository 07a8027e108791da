"""Models to be traced without their weights: parameters without bytes, buffers with their values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from peftsurgery.errors import NotReferable, listing
from peftsurgery.live import pretrained
from peftsurgery.live.swap import refill
from peftsurgery.tasks import Task


class Unallocated(TorchFunctionMode):
    """What is made empty, as parameters are, is made on the meta device; buffers are made of values."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func is torch.empty:
            given["device"] = "meta"
        return func(*args, **given)


def hollow(
    path: Path,
    dtype: torch.dtype,
    *,
    task: Task | None = None,
    labels: int | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The model of a directory with parameters that have a shape, `dtype` and device, and no bytes.

    They are torch's fake tensors on the CPU: operations on them compute shapes, and what does not
    depend on them is computed. Buffers hold what the model's own code puts there.

    Raises:
        CheckpointError: the directory's configuration is not understood.
        NotReferable: a buffer has no value before a checkpoint is loaded.
    """
    config = pretrained.config(path, labels, trust_remote_code=trust_remote_code)
    config.dtype = dtype
    with Unallocated(), _default(dtype):
        model = pretrained.built(config, task, trust_remote_code=trust_remote_code)
    empty = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if empty:
        raise NotReferable(
            f"{type(model).__name__} keeps {listing(empty)} without a value until it is loaded"
        )
    with FakeTensorMode(allow_non_fake_inputs=True):
        refill(model, lambda old: nn.Parameter(torch.empty(old.shape, dtype=old.dtype), requires_grad=False))
    known: Any = model
    known.set_experts_implementation("batched_mm")  # torch's product in groups has shapes of bfloat16 alone
    return model


def emptied(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Take the bytes of some parameters of a hollow model that have any."""
    chosen = {id(parameter) for parameter in parameters}
    mode = next((p.fake_mode for p in model.parameters() if isinstance(p, FakeTensor)), None)
    if not chosen or mode is None:
        return

    def made(old: nn.Parameter) -> nn.Parameter:
        empty = torch.empty(old.shape, dtype=old.dtype)
        return nn.Parameter(empty, requires_grad=False)

    with mode:
        refill(model, lambda old: made(old) if id(old) in chosen else old)


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
