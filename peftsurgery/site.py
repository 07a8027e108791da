"""A site is a name: one place that a module tree, a safetensors header and an ONNX graph can all say."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from math import prod

from torch import Tensor


class Layout(Enum):
    """How a stored weight becomes the (out, in) matrix that every formula is written for."""

    OUT_IN = "out_in"
    """nn.Linear, and convolutions with everything but the first axis flattened."""
    IN_OUT = "in_out"
    """transformers' Conv1D, embeddings, and most constants of an ONNX MatMul."""

    def matrix(self, weight: Tensor) -> Tensor:
        """The stored weight seen as (out, in); a view."""
        flat = weight if weight.ndim == 2 else weight.reshape(weight.shape[0], -1)
        return flat if self is Layout.OUT_IN else flat.t()

    def stored(self, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse of `matrix`, for a weight stored with `shape`; a view."""
        seen = matrix if self is Layout.OUT_IN else matrix.t()
        return seen if seen.shape == shape else seen.reshape(shape)


class Kind(Enum):
    """What the weight at a site does."""

    LINEAR = "linear"
    EMBEDDING = "embedding"
    CONV = "conv"
    TOKENS = "tokens"
    """The word-embedding module, where virtual tokens enter as embeddings; the shape is (vocabulary, d)."""
    ATTENTION = "attention"
    """An attention layer, where they enter as keys and values; the shape is (kv_heads, head_dim)."""
    OUTPUT = "output"
    """A sublayer's output, in front of its residual connection; the shape is (hidden,)."""
    OTHER = "other"
    """A weight that no formula reaches: normalisations, grouped convolutions, quantised or hidden weights."""

    @property
    def has_weight(self) -> bool:
        """Whether the site is a weight, and not a place where tokens enter or a sublayer ends."""
        return self not in (Kind.TOKENS, Kind.ATTENTION, Kind.OUTPUT)

    @property
    def has_name(self) -> bool:
        """Whether adapter files name the site; where tokens enter is told by kind and order."""
        return self.has_weight or self is Kind.OUTPUT


@dataclass(frozen=True, slots=True)
class Site:
    """One named place.

    Args:
        name: the module's dotted name, as `named_modules()` says it; a sublayer's output has the name that
            AdapterHub gives it, which is not always a module's.
        kind: what its weight does, or which tokens enter there.
        shape: the stored shape of its weight; of an attention layer (kv_heads, head_dim), of an output (hidden,).
        layout: how that weight becomes the (out, in) matrix.
        role: AdapterHub's word for an output (`mh_adapter`, `cross_adapter`, `output_adapter`), which targets
            may say; two sites that differ in nothing else are the same.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    layout: Layout = Layout.OUT_IN
    role: str = field(default="", compare=False)

    @property
    def weight(self) -> str:
        """The name of the site's weight tensor."""
        return f"{self.name}.weight"

    @property
    def bias(self) -> str:
        """The name that the site's bias tensor has, where there is one."""
        return f"{self.name}.bias"

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in), the shape of the matrix that formulas see."""
        rows, columns = self.shape[0], prod(self.shape[1:])
        return (rows, columns) if self.layout is Layout.OUT_IN else (columns, rows)

    @property
    def extent(self) -> str:
        """Its sizes in words: `384 → 1536`, `384 wide`, `4 heads of 8`."""
        if self.kind is Kind.TOKENS:
            return f"{self.shape[1]} wide"
        if self.kind is Kind.ATTENTION:
            return f"{self.shape[0]} heads of {self.shape[1]}"
        if self.kind is Kind.OUTPUT:
            return f"{self.shape[0]} wide"
        out, inner = self.matrix_shape
        return f"{inner} → {out}"

    def __str__(self) -> str:
        return f"{self.name} ({self.kind.value} {self.extent})"
