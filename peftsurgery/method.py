"""A method is a formula: a frozen dataclass of hyper-parameters and pure functions over tensors.

It never sees a module, a file, a graph, a dtype, a device or a transposed weight. Its parameters
are a mapping from the names that the PEFT file format gives them (`lora_A.weight`) to tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor

from peftsurgery.errors import NotFoldable, PlanError
from peftsurgery.site import Kind, Site

Params = Mapping[str, Tensor]

TABLE = "prompt_embeddings"
"""The one parameter of a baked token method: the tokens themselves."""

Map = Callable[[Tensor], Tensor]
"""A pure function of one tensor."""


class Op(Protocol):
    """What a weight method may ask of the linear operation that it grafts.

    `x` is the operation's own input; the place casts and lays out every (out, in) matrix.
    """

    def __call__(self, x: Tensor) -> Tensor:
        """The untouched base, bias and hooks included."""

    def folded(self, x: Tensor, fold: Map, fold_bias: Map) -> Tensor:
        """The base with `fold(W)` for its (out, in) weight and `fold_bias(b)` for its bias."""

    def inner(self, x: Tensor, matrix: Tensor) -> Tensor:
        """The same operation, same stride and padding, with a (k, in) matrix and no bias."""

    def outer(self, h: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        """An (out, k) matrix, and a bias of shape (out,), applied to what `inner` gave."""

    def drop(self, x: Tensor) -> Tensor:
        """Dropout, in training mode; the identity otherwise, and on integer inputs."""


@dataclass(frozen=True)
class Method(ABC):
    """One parameter-efficient method with its hyper-parameters."""

    name: ClassVar[str]
    """The word for it, on the command line and in `METHODS`."""
    peft_type: ClassVar[str | None]
    """The word for it in PEFT's `adapter_config.json`; None where PEFT has no such method."""
    kinds: ClassVar[frozenset[Kind]]
    """The kinds of site that it can be put at."""

    def check(self, site: Site) -> str | None:
        """Why the method cannot be put at `site`, as the end of a sentence; None if it can."""
        if site.kind is Kind.OTHER:
            return "has a weight that is quantised, grouped, a norm's, or read by its parent directly"
        return (
            None
            if site.kind in self.kinds
            else f"is for {site.kind.value}, which {self.name} has no formula for"
        )

    @abstractmethod
    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """The names and shapes of the parameters at `site`."""

    @abstractmethod
    def init(
        self, site: Site, weight: Tensor | None, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Fresh float32 parameters for `site` on the CPU; `weight` is its (out, in) matrix where known."""

    def shared_shapes(self, sites: Sequence[Site]) -> dict[str, tuple[int, ...]]:
        """The names and shapes of the parameters that all its sites share; most methods have none."""
        return {}

    def init_shared(
        self,
        sites: Sequence[Site],
        generator: torch.Generator | None = None,
        vocabulary: Tensor | None = None,
        ids: Sequence[int] = (),
    ) -> dict[str, Tensor]:
        """Fresh float32 values on the CPU for `shared_shapes(sites)`; see `TokenMethod`."""
        return {}

    @property
    def twins(self) -> Mapping[str, str]:
        """Second names under which AdapterHub's files hold a parameter once more → the name that it has here."""
        return {}

    def stage(self, parameter: str) -> int:
        """The stage of a training in two in which the parameter of that name moves: 1 or 2."""
        return 1

    @property
    def trains_in(self) -> int:
        """The stage that a freshly grafted method is in."""
        return 1

    def penalty(self, p: Params) -> Tensor | None:
        """A scalar for the training to add to its loss; None where the method asks for nothing."""
        return None

    def scaled(self, factor: float) -> Self:
        """The method whose effect is `factor` times this one's."""
        raise NotFoldable(f"{self.name} has no scale of its own. Export the model with it instead.")


@dataclass(frozen=True)
class WeightMethod(Method):
    """A method that cuts a weight: `fold` is its definition, `forward` only a faster way to say it."""

    @property
    def dropout(self) -> float:
        """Probability with which an input is dropped in training."""
        return 0.0

    @abstractmethod
    def fold(self, w: Tensor, p: Params) -> Tensor:
        """The new (out, in) weight; `w` and every parameter are float32."""

    def part(self, p: Params, rows: slice, columns: slice) -> Params | None:
        """The parameters of a block: `fold(W, p)[rows, columns]` is `fold(W[rows, columns], part)`.

        None where the block cannot be folded without the rest; the weight is then folded whole.
        """
        return None

    @property
    def moves_bias(self) -> bool:
        """Whether `fold_bias` does anything, so that the site must have a bias."""
        return False

    def fold_bias(self, bias: Tensor, p: Params) -> Tensor:
        """The new bias of shape (out,); most methods leave it alone."""
        return bias

    def forward(self, op: Op, x: Tensor, p: Params) -> Tensor:
        """The base operation with `fold(W)`; override it to be faster, never to mean something else."""
        return op.folded(x, lambda w: self.fold(w, p), lambda b: self.fold_bias(b, p))


@dataclass(frozen=True)
class TokenMethod(Method):
    """A method that cuts the tokens: `tokens` is its definition, and `bake` evaluates it once for all.

    Its parameters are shared by its sites: they lie in `Adapter.shared`, under the names that PEFT's own
    encoder modules give them, and `params[site]` is empty. At a `Kind.TOKENS` site the virtual tokens are
    embeddings in front of the words; at the `Kind.ATTENTION` sites, all layers in order, they are keys and
    values in front of each layer's own.
    """

    trainable: ClassVar[bool] = True
    """Whether there is anything to train."""

    def __post_init__(self) -> None:
        whole(self, "num_virtual_tokens")

    @property
    @abstractmethod
    def num_virtual_tokens(self) -> int:
        """How many tokens enter in front of every input."""

    @property
    def start_text(self) -> str | None:
        """The text whose token ids `init_shared` starts from, where there is one."""
        return None

    @property
    def needs_vocabulary(self) -> bool:
        """Whether `init_shared` starts from rows of the base's word embeddings."""
        return False

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        return {}

    def init(
        self, site: Site, weight: Tensor | None, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        return {}

    @abstractmethod
    def shared_shapes(self, sites: Sequence[Site]) -> dict[str, tuple[int, ...]]:
        """The names and shapes of its parameters at `sites`.

        Raises:
            PlanError: the method cannot stand at these sites together.
        """

    @abstractmethod
    def init_shared(
        self,
        sites: Sequence[Site],
        generator: torch.Generator | None = None,
        vocabulary: Tensor | None = None,
        ids: Sequence[int] = (),
    ) -> dict[str, Tensor]:
        """Fresh float32 parameters on the CPU, distributed as PEFT's are.

        Args:
            vocabulary: the (vocabulary, d) word embeddings of the base, where `needs_vocabulary`.
            ids: the token ids of `start_text`, where there is one.

        Raises:
            PlanError: the start needs what was not given.
        """

    @abstractmethod
    def tokens(self, p: Params, *, training: bool = False) -> Tensor:
        """The virtual tokens, differentiable in every parameter.

        Embeddings are (num_virtual_tokens · num_transformer_submodules, d). Keys and values are
        (num_virtual_tokens, 2 · layers · kv_heads · head_dim), PEFT's flat layout: viewed as
        (n, 2 · layers, kv_heads, head_dim), even indices are keys and odd ones values.

        Args:
            training: whether an encoder that has dropout drops.
        """

    def halved(self) -> Self:
        """The method for a model of two halves, encoder and decoder, where it keeps a table for each."""
        return self

    @abstractmethod
    def baked(self) -> TokenMethod:
        """The method that holds these tokens as a mere table; itself when it does already."""

    def bake(self, p: Params) -> tuple[TokenMethod, dict[str, Tensor]]:
        """`baked()` and its table: the very tokens of evaluation mode, without a gradient."""
        with torch.no_grad():
            return self.baked(), {TABLE: self.tokens(p).detach()}


@dataclass(frozen=True)
class OutputMethod(Method):
    """A method that cuts a sublayer's output: `forward` is its definition, and nothing eliminates it.

    A sublayer computes y, and its layer goes on with norm(y + residual) (post-norm) or y + residual
    (pre-norm). The method puts y' in the place of y. Its files are AdapterHub's.
    """

    peft_type: ClassVar[str | None] = None

    @property
    def is_final(self) -> bool:
        """Whether the layer goes on with y' itself, its own residual connection and norm left out."""
        return False

    @abstractmethod
    def forward(self, y: Tensor, residual: Tensor, norm: Map | None, p: Params, training: bool) -> Tensor:
        """What goes on in the place of `y`; the formula of the method.

        Args:
            y: (…, d), the sublayer's output after its dropout.
            residual: (…, d), what the layer adds to it.
            norm: the layer's own LayerNorm, which it applies to the sum; None in a pre-norm layer.
            training: whether dropout drops.
        """


def whole(method: Method, *fields: str) -> None:
    """Raise a PlanError unless each of the method's fields is a whole number of at least 1."""
    for field in fields:
        value = getattr(method, field)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise PlanError(
                f"{field} is {value!r} and has to be a whole number of at least 1. "
                f"Try `{type(method).__name__}({field}={20 if field == 'num_virtual_tokens' else 2})`."
            )
