"""AdapterHub's tensor keys: `<site>.<bag>.<adapter>.<parameter>`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor

from peftsurgery.disk.adapterhub_config import Said
from peftsurgery.disk.adapterhub_models import ours, theirs
from peftsurgery.disk.peft_sites import natural
from peftsurgery.errors import MismatchedTensors, listing
from peftsurgery.method import Params


def by_site(tensors: Mapping[str, Tensor], mark: str, said: Said) -> dict[str, dict[str, Tensor]]:
    """The parameters by site, in today's names.

    Args:
        mark: what stands in front of the adapter's name, e.g. `.adapters.`.

    Raises:
        MismatchedTensors: a key that is none of the adapter's, or no key at all.
    """
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    strange = []
    for key, tensor in tensors.items():
        site, found_mark, name = key.partition(f"{mark}{said.name}.")
        if found_mark and site and tensor.is_floating_point():
            found[ours(site, said.model_type)][name] = tensor
        else:
            strange.append(key)
    if strange or not found:
        fact = f"holds {listing(sorted(strange, key=natural))}, which is" if strange else "holds nothing"
        raise MismatchedTensors(
            f"The file {fact} no tensor of {said.name!r} (`<place>{mark}{said.name}.<parameter>`). The two files "
            "are not of one adapter: save or download it again.",
            unexpected=strange,
        )
    return dict(found)


def own(tensors: Mapping[str, Tensor], mark: str, name: str) -> dict[str, Tensor]:
    """The tensors of a file without those of others whose names begin like this one's.

    AdapterHub saves with the head or the fusion `a` those called `ab` too, and passes over them when it loads.
    """
    other = re.compile(rf"(?:^|.*\.){re.escape(mark)}\.{re.escape(name)}[^.]+\.")
    return {key: tensor for key, tensor in tensors.items() if not other.match(key)}


def keyed(
    params: Mapping[str, Params], mark: str, name: str, model_type: str | None
) -> list[tuple[str, Tensor]]:
    """The parameters under AdapterHub's keys, in safetensors' order: wide dtypes first, then by key."""
    found = [
        (f"{theirs(site, model_type)}{mark}{name}.{word}", tensor)
        for site, own in params.items()
        for word, tensor in own.items()
    ]
    return ordered(found)


def ordered(tensors: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """In safetensors' order: wide dtypes first, then by key."""
    return sorted(tensors, key=lambda pair: (-pair[1].dtype.itemsize, pair[0]))
