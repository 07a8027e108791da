"""P-tuning: the prompt is what an encoder makes of a table E  (Liu et al. 2021, https://arxiv.org/abs/2103.10385)

MLP: P = W₄·relu(W₂·relu(W₀·E + b₀) + b₂) + b₄.  LSTM: P = W₂·relu(W₀·H + b₀) + b₂, H being both directions
of an LSTM over E. The layers and the names of the parameters are those of PEFT's `PromptEncoder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import linear, relu

from peftsurgery.errors import PlanError, listing
from peftsurgery.method import Params, TokenMethod, whole
from peftsurgery.methods import starts
from peftsurgery.methods.prompt import PromptTuning
from peftsurgery.site import Kind, Site

ENCODERS = ("MLP", "LSTM")
EMBEDDING, HEAD, LSTM = "embedding.weight", "mlp_head", "lstm_head"


@dataclass(frozen=True)
class PTuning(TokenMethod):
    """Virtual tokens from a trained encoder, which baking evaluates and drops.

    Args:
        num_virtual_tokens: how many.
        num_transformer_submodules: 2 on encoder-decoders (tokens for each half), else 1.
        encoder_reparameterization_type: `"MLP"` (three linear maps) or `"LSTM"` (bidirectional, then two).
        encoder_hidden_size: the encoder's inner width; that of the embeddings by default.
        encoder_num_layers: layers of the LSTM.
        encoder_dropout: dropout between the layers of the LSTM, in training.

    Raises:
        PlanError: a hyper-parameter out of its range.
    """

    name: ClassVar[str] = "p-tuning"
    peft_type: ClassVar[str] = "P_TUNING"
    kinds: ClassVar[frozenset[Kind]] = frozenset({Kind.TOKENS})

    num_virtual_tokens: int = 20
    encoder_reparameterization_type: str = "MLP"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0
    num_transformer_submodules: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self, "encoder_num_layers", "num_transformer_submodules")
        if self.encoder_hidden_size is not None:
            whole(self, "encoder_hidden_size")
        if self.encoder_reparameterization_type not in ENCODERS:
            raise PlanError(
                f"encoder_reparameterization_type is {self.encoder_reparameterization_type!r} and is one of "
                f"{listing(ENCODERS)}. Try `PTuning(encoder_reparameterization_type='MLP')`."
            )
        if not 0 <= self.encoder_dropout < 1:
            raise PlanError(
                f"encoder_dropout is {self.encoder_dropout} and lies in [0, 1). "
                "Try `PTuning(encoder_dropout=0.1)`."
            )

    @property
    def _has_lstm(self) -> bool:
        return self.encoder_reparameterization_type == "LSTM"

    def shared_shapes(self, sites: Sequence[Site]) -> dict[str, tuple[int, ...]]:
        d = sites[0].shape[1]
        hidden = self.encoder_hidden_size or d
        table = {EMBEDDING: (self.num_virtual_tokens * self.num_transformer_submodules, d)}
        if not self._has_lstm:
            return table | _linears((d, hidden, hidden, d))
        return table | self._recurrent(d, hidden) | _linears((2 * hidden, 2 * hidden, d))

    def init_shared(
        self,
        sites: Sequence[Site],
        generator: torch.Generator | None = None,
        vocabulary: Tensor | None = None,
        ids: Sequence[int] = (),
    ) -> dict[str, Tensor]:
        shapes = self.shared_shapes(sites)
        hidden = self.encoder_hidden_size or sites[0].shape[1]
        maps = {name: shape for name, shape in shapes.items() if name.startswith(HEAD)}
        return {
            EMBEDDING: starts.normal(shapes[EMBEDDING], generator),
            **{
                name: starts.uniform(shape, hidden, generator)
                for name, shape in shapes.items()
                if name.startswith(LSTM)
            },
            **starts.linear(maps, generator),
        }

    def tokens(self, p: Params, *, training: bool = False) -> Tensor:
        x = p[EMBEDDING].unsqueeze(0)  # a batch of one, as in PEFT: it decides which kernel sums, so the bits
        x = self._lstm(x, p, training) if self._has_lstm else x
        last = 2 if self._has_lstm else 4
        for layer in range(0, last, 2):
            x = relu(linear(x, p[f"{HEAD}.{layer}.weight"], p[f"{HEAD}.{layer}.bias"]))
        return linear(x, p[f"{HEAD}.{last}.weight"], p[f"{HEAD}.{last}.bias"])[0]

    def halved(self) -> Self:
        return replace(self, num_transformer_submodules=2)

    def baked(self) -> PromptTuning:
        return PromptTuning(self.num_virtual_tokens, self.num_transformer_submodules)

    def _recurrent(self, d: int, hidden: int) -> dict[str, tuple[int, ...]]:
        inner = [d] + [2 * hidden] * (self.encoder_num_layers - 1)
        return {
            f"{LSTM}.{word}_l{layer}{way}": shape
            for layer, width in enumerate(inner)
            for way in ("", "_reverse")
            for word, shape in (
                ("weight_ih", (4 * hidden, width)),
                ("weight_hh", (4 * hidden, hidden)),
                ("bias_ih", (4 * hidden,)),
                ("bias_hh", (4 * hidden,)),
            )
        }

    def _lstm(self, x: Tensor, p: Params, training: bool) -> Tensor:
        """Both directions of every layer over (1, n, d), as nn.LSTM computes them: (1, n, 2·hidden).

        Without gradients torch takes another kernel, with other bits; ours are those of training, always,
        which are the bits that PEFT stores.
        """
        learning = torch.is_grad_enabled()
        x, *weights = (
            t if learning else t.detach() for t in (x, *(p[name] for name in self._recurrent(1, 1)))
        )
        start = x.new_zeros(2 * self.encoder_num_layers, 1, weights[1].shape[1])
        layers, dropout = self.encoder_num_layers, self.encoder_dropout
        with torch.enable_grad():
            return torch.lstm(x, (start, start), weights, True, layers, dropout, training, True, True)[0]


def _linears(widths: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """The linear maps of PEFT's `mlp_head`; at odd positions stand its ReLUs."""
    found: dict[str, tuple[int, ...]] = {}
    for index, (inner, out) in enumerate(pairwise(widths)):
        found |= {f"{HEAD}.{2 * index}.weight": (out, inner), f"{HEAD}.{2 * index}.bias": (out,)}
    return found
