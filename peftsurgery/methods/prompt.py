"""Prompt tuning: a table P of (n, d) in front of the embedded words  (Lester et al. 2021, https://arxiv.org/abs/2104.08691)

[P; E(x)] replaces E(x), E being the word embeddings. An encoder-decoder has two tables, one below the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from peftsurgery.errors import PlanError, listing
from peftsurgery.method import TABLE, Params, TokenMethod, whole
from peftsurgery.methods.starts import normal
from peftsurgery.site import Kind, Site

STARTS = ("RANDOM", "TEXT", "SAMPLE_VOCAB")


@dataclass(frozen=True)
class PromptTuning(TokenMethod):
    """Trained embeddings in front of every input.

    Args:
        num_virtual_tokens: how many.
        num_transformer_submodules: 2 on encoder-decoders (a table for each half), else 1.
        prompt_tuning_init: `"RANDOM"` draws from N(0, 1); `"TEXT"` takes the word embeddings of a text,
            repeated or cut to fill the table; `"SAMPLE_VOCAB"` those of random words.
        prompt_tuning_init_text: the text.
        tokenizer_name_or_path: whose tokenizer reads the text; the base's own by default.

    Raises:
        PlanError: a hyper-parameter out of its range, or a text that is missing.
    """

    name: ClassVar[str] = "prompt-tuning"
    peft_type: ClassVar[str] = "PROMPT_TUNING"
    kinds: ClassVar[frozenset[Kind]] = frozenset({Kind.TOKENS})

    num_virtual_tokens: int = 20
    num_transformer_submodules: int = 1
    prompt_tuning_init: str = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self, "num_transformer_submodules")
        if self.prompt_tuning_init not in STARTS:
            raise PlanError(
                f"prompt_tuning_init is {self.prompt_tuning_init!r} and is one of {listing(STARTS)}. "
                "Try `PromptTuning(prompt_tuning_init='RANDOM')`."
            )
        if (self.prompt_tuning_init == "TEXT") != bool(self.prompt_tuning_init_text):
            raise PlanError(
                f"prompt_tuning_init is {self.prompt_tuning_init!r} and prompt_tuning_init_text is "
                f"{self.prompt_tuning_init_text!r}; a text and 'TEXT' go together. "
                "Try `PromptTuning(prompt_tuning_init='TEXT', prompt_tuning_init_text='Is it a complaint?')`."
            )

    @property
    def start_text(self) -> str | None:
        return self.prompt_tuning_init_text

    @property
    def needs_vocabulary(self) -> bool:
        return self.prompt_tuning_init != "RANDOM"

    def shared_shapes(self, sites: Sequence[Site]) -> dict[str, tuple[int, ...]]:
        return {TABLE: (self.num_virtual_tokens * self.num_transformer_submodules, sites[0].shape[1])}

    def init_shared(
        self,
        sites: Sequence[Site],
        generator: torch.Generator | None = None,
        vocabulary: Tensor | None = None,
        ids: Sequence[int] = (),
    ) -> dict[str, Tensor]:
        shape = self.shared_shapes(sites)[TABLE]
        if not self.needs_vocabulary:
            return {TABLE: normal(shape, generator)}
        if vocabulary is None:
            raise PlanError(
                f"A start from {self.prompt_tuning_init!r} takes rows of the base's word embeddings, and "
                "there are none. Give a model whose weights are loaded, or start from 'RANDOM'."
            )
        if self.prompt_tuning_init == "SAMPLE_VOCAB":
            ids = torch.randint(0, vocabulary.shape[0], shape[:1], generator=generator).tolist()
        return {TABLE: rows(vocabulary, filled(ids, shape[0]))}

    def tokens(self, p: Params, *, training: bool = False) -> Tensor:
        return p[TABLE]

    def halved(self) -> Self:
        return replace(self, num_transformer_submodules=2)

    def baked(self) -> PromptTuning:
        return self


def filled(ids: Sequence[int], count: int) -> list[int]:
    """The ids repeated or cut to `count`, as PEFT does.

    Raises:
        PlanError: there are none.
    """
    if not ids:
        raise PlanError(
            "The text to start from has no token. Give `prompt_tuning_init_text` and a tokenizer, "
            "or start from 'RANDOM'."
        )
    return (list(ids) * -(-count // len(ids)))[:count]


def rows(vocabulary: Tensor, ids: Sequence[int]) -> Tensor:
    """Copies of the embeddings of `ids`, float32 on the CPU.

    Raises:
        PlanError: an id that the vocabulary has not got.
    """
    strange = [index for index in ids if not 0 <= index < vocabulary.shape[0]]
    if strange:
        raise PlanError(
            f"The token {strange[0]} is none of the {vocabulary.shape[0]} that the base embeds. "
            "Take the base's own tokenizer."
        )
    return vocabulary.detach()[list(ids)].to("cpu", torch.float32, copy=True)
