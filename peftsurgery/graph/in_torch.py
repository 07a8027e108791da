"""A model in torch, run as a graph is: arrays in, arrays out, keys and values left where they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftsurgery.graph import cache
from peftsurgery.graph.inputs import Array
from peftsurgery.graph.session import Feeds
from peftsurgery.graph.signature import Signature, call

Forward = Callable[..., Any]


class Torch:
    """What a `Session` is to a graph, to a module: for encoders `run`, and for decoders `step`.

    Args:
        model: in evaluation; gradients are off.
        said: its inputs and outputs.
        compiled: whether `torch.compile` makes it faster; the first runs of a shape then take seconds.
    """

    def __init__(self, model: nn.Module, said: Signature, *, compiled: bool = False) -> None:
        self.device = next(model.parameters()).device
        self.said = said
        self.model: Any = torch.compile(model, dynamic=True) if compiled else model

    @torch.no_grad()
    def run(self, feeds: Feeds) -> dict[str, Array]:
        """The outputs by name."""
        given = call(self.model, self._tensors(feeds))
        return {port.name: given[port.name].numpy(force=True) for port in self.said.outputs}

    @torch.no_grad()
    def step(self, feeds: Feeds, past: Mapping[str, Any]) -> tuple[Array, dict[str, Any]]:
        """As `Session.step`."""
        given = call(self.model, self._tensors({**feeds, **past}))
        kept = {f"{cache.PAST}{name.removeprefix(cache.PRESENT)}": t for name, t in given.items()}
        logits = kept.pop(f"{cache.PAST}logits")
        return logits.numpy(force=True), kept

    def past_ports(self) -> dict[str, tuple[int, int]]:
        """As `Session.past_ports`."""
        ports = [port for port in self.said.inputs if cache.is_cached([port.name])]
        return {port.name: (int(port.axes[1]), int(port.axes[3])) for port in ports}

    def _tensors(self, feeds: Mapping[str, Any]) -> dict[str, Tensor]:
        return {
            port.name: torch.as_tensor(feeds[port.name], dtype=port.torch_dtype, device=self.device)
            for port in self.said.inputs
        }


class TorchPair:
    """What a `Pair` is to two graphs, to an encoder-decoder in torch.

    Args:
        model, compiled: as for `Torch`.
    """

    def __init__(self, model: Any, *, compiled: bool = False) -> None:
        self.encoder: Any = model.get_encoder()
        self.model: Any = torch.compile(model, dynamic=True) if compiled else model
        if compiled:
            self.encoder = torch.compile(self.encoder, dynamic=True)

    @torch.no_grad()
    def read(self, feeds: Feeds) -> dict[str, Any]:
        """As `Pair.read`."""
        ids, mask = (torch.as_tensor(feeds[name]) for name in ("input_ids", "attention_mask"))
        hidden = self.encoder(input_ids=ids, attention_mask=mask, return_dict=True)
        return {"encoder_outputs": hidden, "attention_mask": mask, "past_key_values": None}

    @torch.no_grad()
    def write(self, state: Mapping[str, Any], tokens: Array) -> tuple[Array, dict[str, Any]]:
        """As `Pair.write`."""
        given = self.model(
            decoder_input_ids=torch.as_tensor(tokens), use_cache=True, return_dict=True, **state
        )
        return given.logits.numpy(force=True), {**state, "past_key_values": given.past_key_values}
