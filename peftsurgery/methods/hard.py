"""A hard prompt: the embeddings of given tokens in front of every input; nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from peftsurgery.errors import PlanError
from peftsurgery.method import TABLE, Params, TokenMethod
from peftsurgery.methods.prompt import PromptTuning, rows
from peftsurgery.site import Kind, Site


@dataclass(frozen=True)
class HardPrompt(TokenMethod):
    """A text in front of every input, as token ids. Its table is the base's own embeddings of them.

    PEFT has no word for it; in its files it is a prompt table.

    Args:
        ids: the token ids.
        prompt_tuning_init_text: the text instead; `inject` reads it with the base's tokenizer, without the
            special tokens of a whole input, and puts its ids in its place.

    Raises:
        PlanError: neither or both are given; or a question that the ids answer, while there is only a text.
    """

    name: ClassVar[str] = "hard-prompt"
    peft_type: ClassVar[str] = "PROMPT_TUNING"
    kinds: ClassVar[frozenset[Kind]] = frozenset({Kind.TOKENS})
    trainable: ClassVar[bool] = False

    ids: tuple[int, ...] = ()
    prompt_tuning_init_text: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", tuple(self.ids))
        if bool(self.ids) == bool(self.prompt_tuning_init_text):
            raise PlanError(
                "A hard prompt is a text or its token ids, at least one and not both. "
                "Try `HardPrompt(prompt_tuning_init_text='Is it a complaint?')`."
            )

    def spelled(self, ids: Sequence[int]) -> HardPrompt:
        """The prompt of the ids that a tokenizer made of its text."""
        return HardPrompt(tuple(ids))

    @property
    def num_virtual_tokens(self) -> int:
        if not self.ids:
            raise PlanError(
                "A hard prompt's text is words until a tokenizer reads them. Call `inject(MODEL, …)` with it, or "
                "give the ids: `HardPrompt(tuple(tokenizer(TEXT, add_special_tokens=False).input_ids))`."
            )
        return len(self.ids)

    @property
    def needs_vocabulary(self) -> bool:
        return True

    def shared_shapes(self, sites: Sequence[Site]) -> dict[str, tuple[int, ...]]:
        return {TABLE: (len(self.ids), sites[0].shape[1])}

    def init_shared(
        self,
        sites: Sequence[Site],
        generator: torch.Generator | None = None,
        vocabulary: Tensor | None = None,
        ids: Sequence[int] = (),
    ) -> dict[str, Tensor]:
        if vocabulary is None:
            raise PlanError(
                "A hard prompt takes the base's word embeddings, and there are none. "
                "Give a model whose weights are loaded."
            )
        return {TABLE: rows(vocabulary, self.ids)}

    def tokens(self, p: Params, *, training: bool = False) -> Tensor:
        return p[TABLE]

    def baked(self) -> PromptTuning:
        return PromptTuning(len(self.ids))
