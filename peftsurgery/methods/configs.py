"""The configurations of bottlenecks that have names: a method, and the sublayers that it goes to.

They are those of AdapterHub's adapters 1.3.0, under the names of the papers and under its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from peftsurgery.methods.bottleneck import Bottleneck


@dataclass(frozen=True, slots=True)
class Config:
    """A bottleneck and its places, in AdapterHub's words for sublayers."""

    method: Bottleneck
    targets: tuple[str, ...] = ("output_adapter",)


_PFEIFFER = Config(Bottleneck(original_ln_before=True))
_HOULSBY = Config(Bottleneck(non_linearity="swish"), ("mh_adapter", "output_adapter"))
_PARALLEL = Config(Bottleneck(2, is_parallel=True, scaling=4.0, init_weights="mam_adapter"))
_SCALED = Config(replace(_PARALLEL.method, scaling="learned"))

CONFIGS: Mapping[str, Config] = {
    **dict.fromkeys(("pfeiffer", "seq_bn"), _PFEIFFER),
    **dict.fromkeys(("houlsby", "double_seq_bn"), _HOULSBY),
    **dict.fromkeys(("parallel", "par_bn"), _PARALLEL),
    **dict.fromkeys(("scaled-parallel", "scaled_par_bn"), _SCALED),
}
