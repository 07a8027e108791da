"""Tied weights: several names that are one tensor, and what folding does to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from peftsurgery.errors import TiedSites, listing


def settle(
    groups: Sequence[tuple[str, ...]], new: Mapping[str, Tensor], *, untie: bool
) -> list[tuple[str, ...]]:
    """The tied groups that a merge splits; those whose twins all changed in the same way stay tied.

    Args:
        groups: names that are one tensor.
        new: the folded tensors by name.

    Raises:
        TiedSites: a group would be split and `untie` is false.
    """
    split = [group for group in groups if any(name in new for name in group) and not _agree(group, new)]
    if split and not untie:
        hit = [name for name in split[0] if name in new]
        raise TiedSites(
            f"{listing(hit)} is folded, and {listing([n for n in split[0] if n not in hit] or split[0])} is the same "
            "tensor, which would change behind its back. Merge with `untie=True` (`--untie`) to give each its own; "
            "nothing was changed.",
            names=split[0],
        )
    return split


def _agree(group: Sequence[str], new: Mapping[str, Tensor]) -> bool:
    """Whether every twin was folded, and to the same tensor up to its dtype's rounding."""
    if not all(name in new for name in group):
        return False
    first, *rest = (new[name] for name in group)
    eps = torch.finfo(first.dtype).eps
    slack = 2 * eps * float(first.abs().max())
    return all(torch.allclose(first, twin, rtol=2 * eps, atol=slack) for twin in rest)
