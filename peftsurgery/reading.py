"""How a model reads its virtual tokens, where that may differ from PEFT's way."""

from __future__ import annotations

from dataclasses import dataclass

from peftsurgery.errors import PlanError

POOLS = ("first", "cls")


@dataclass(frozen=True, slots=True)
class Reading:
    """Choices that PEFT does not offer; the defaults are PEFT's way, which adapters were trained with.

    Args:
        strip_virtual_outputs: outputs per token are as long as the input, without the prompt's own.
        pool: what a pooler or a classifier reads: the `first` token, which is the prompt's (PEFT), or `cls`,
            the first of the input. Then the prompt is taken off before the pooler, and no output has it.
        position_shift: whether an encoder numbers the words after a prefix from n on (PEFT) or from 0
            (AdapterHub).

    Raises:
        PlanError: `pool` is neither.
    """

    strip_virtual_outputs: bool = False
    pool: str = "first"
    position_shift: bool = True

    def __post_init__(self) -> None:
        if self.pool not in POOLS:
            raise PlanError(f"pool is {self.pool!r} and is 'first' or 'cls'. Nothing was changed.")


AS_PEFT = Reading()
