"""How a model stands while it is traced or compared; it stands as before when that is over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, each module put back to its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Attention written out as products and a softmax, which is the leanest graph up to opset 22, and experts that
    each multiply the words sent to them, in the one operation that `experts` writes.

    The configurations say it, one for every model inside: Falcon reads its own at every call, though it refuses
    transformers' `set_attn_implementation`.
    """
    from transformers import PreTrainedModel

    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    before = [(config._attn_implementation, config._experts_implementation) for config in configs]
    for config in configs:
        config._attn_implementation, config._experts_implementation = "eager", "grouped_mm"
    try:
        yield
    finally:
        for config, words in zip(configs, before, strict=True):
            config._attn_implementation, config._experts_implementation = words


class _Clamped(TorchFunctionMode):
    """Layers that clamp their own values where some are infinite always clamp them.

    In float16 BART asks `isfinite(x).all()` and T5 `isinf(x).any()` before they clamp to 64504. A trace cannot ask, so
    both are told that there are: what is finite and no larger stays as it is, as in mBART, which does not ask.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.all, Tensor.any) and any(args[0] is one for one in self.asked):
            return torch.ones((), dtype=torch.bool, device=args[0].device) if func is Tensor.any else False
        found = func(*args, **(kwargs or {}))
        if func in (torch.isfinite, torch.isinf):
            self.asked.append(found)
        return found


@contextmanager
def blind(model: nn.Module) -> Iterator[None]:
    """Evaluation where tensors may have no values: in a trace, and where only shapes and dtypes are asked for."""
    with evaluating(model), _Clamped():
        yield
