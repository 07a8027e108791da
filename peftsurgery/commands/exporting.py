"""What every export does: trace, lay companions beside the graph, compare with torch, report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from peftsurgery.adapter import Adapter
from peftsurgery.commands.adapter_files import Given
from peftsurgery.commands.companions import carry, merged_config
from peftsurgery.commands.operating import has_tokens, operated, stays
from peftsurgery.commands.placement import CUDA, fused, placement
from peftsurgery.commands.prefixed import computed, generates, plain
from peftsurgery.commands.report import Report, size
from peftsurgery.disk.adapter_files import put
from peftsurgery.disk.durable import write_json
from peftsurgery.disk.locate import locate
from peftsurgery.events import Event, Listener
from peftsurgery.live import soft
from peftsurgery.live.active import canonical_name
from peftsurgery.live.blueprint import classes
from peftsurgery.live.precision import coarsest, exact
from peftsurgery.reading import Reading

if TYPE_CHECKING:
    from torch import nn

    from peftsurgery.graph.parity import Parity, Row
    from peftsurgery.graph.reference import Held
    from peftsurgery.graph.signature import Signature


Worn = tuple[list[Adapter], bool, str | None, bool, Reading, torch.dtype | None]
"""What `operated` takes beside the model."""


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be exported, and how: the words of `export_onnx`, its adapters loaded."""

    model: nn.Module | str | Path
    adapters: list[Adapter]
    out: Path
    factored: bool
    task: str | None
    opset: int
    verify: bool
    tolerance: float | None
    reading: Reading
    trust_remote_code: bool
    prefix: str
    weights: str | None
    dtype: torch.dtype | None
    portable: bool
    check_placement: str | None
    target: str
    hash: bool
    given: tuple[Given, ...]

    @property
    def worn(self) -> Worn:
        """What `operated` takes beside the model."""
        return self.adapters, self.factored, self.task, self.trust_remote_code, self.reading, self.dtype

    @property
    def dtype_word(self) -> str | None:
        """The dtype's word, as config.json spells it."""
        return None if self.dtype is None else str(self.dtype).removeprefix("torch.")

    @property
    def merged(self) -> list[Adapter]:
        """The adapters that are folded into the weights."""
        return [] if self.factored else [a for a in self.adapters if not stays(a)]

    @property
    def kept(self) -> Worn:
        """What `operated` takes beside a model that the merged ones are in already."""
        left = [a for a in self.adapters if self.factored or stays(a)]
        return left, *self.worn[1:]

    @property
    def wearable(self) -> list[Given]:
        """Those whose parameters the graph reads as they are in their files: no tokens, which are evaluated."""
        left = [one for one in self.given if self.factored or stays(one.adapter)]
        return [one for one in left if not has_tokens(one.adapter)]

    @property
    def form(self) -> str:
        """What became of the adapters."""
        forms = dict.fromkeys(
            "factored" if self.factored else "grafted" if stays(a) else "merged" for a in self.adapters
        )
        return " + ".join(forms) or "base"


class Traced(NamedTuple):
    """What a model became.

    Args:
        graphs: by the names of their files.
        prefix, apart: a decoder's soft prompts, in the graph or to be fed to it (see `Plain`).
        facts: what a report says of the graphs.
    """

    graphs: Mapping[str, Any]
    signature: Signature
    prefix: Mapping[str, Tensor]
    apart: Mapping[str, Tensor]
    facts: Mapping[str, Any]

    @property
    def opset(self) -> int:
        """The opset that a runtime has to know."""
        opsets: list[int] = [graph.graph.opset_imports[""] for graph in self.graphs.values()]
        return max(opsets)


def traced(live: nn.Module, order: Order, held: Mapping[str, Held] | None = None) -> Traced:
    """The graphs of a model; initializers in `held` stay where they lie.

    Raises:
        PlacementError: placement is to be checked, and something has no kernel.
        UnsupportedModel, ExportError: as `trace` does.
    """
    from peftsurgery.graph import layers, seq2seq
    from peftsurgery.graph.export import trace
    from peftsurgery.graph.signature import SEQ2SEQ

    with plain(live, order.task, _prefix(order, live, held), form=order.prefix) as bare:
        tables, tokens = soft.named(live)
        names, said = partial(canonical_name, live), bare.signature
        tabled = [names(table) for table in tables]
        words = partial(trace, opset=order.opset, tables=tabled, tokens=tokens, held=held)
        words = partial(words, portable=order.portable, fuse=order.target == CUDA)
        if said.task != SEQ2SEQ:
            graphs = {
                seq2seq.SINGLE: words(live, said, names=names, prefix=bare.prefix, watch=layers.of(live))
            }
        else:
            inside = partial(_inside, names)
            parts = seq2seq.halves(live, said, soft.cached(live))
            words = partial(words, names=inside, run=seq2seq.run)
            graphs = {p.file: words(p.module, p.signature, watch=layers.of(live, p.part)) for p in parts}
        facts = {**fused(graphs), **(placement(graphs) if order.check_placement else {})}
        return Traced(graphs, said, bare.prefix, bare.apart, facts)


def _inside(names: Callable[[str], str], full: str) -> str:
    """The name of a parameter of the whole model, from that in one of its halves."""
    from peftsurgery.graph.seq2seq import INSIDE

    return names(full.removeprefix(INSIDE))


def write_prefix(done: Traced, file: Path) -> None:
    """Write the keys and values of soft prompts, where they are not in the graph."""
    if done.apart:
        put(file, [*done.apart.items()])


def _prefix(order: Order, live: nn.Module, held: Mapping[str, Held] | None) -> dict[str, Tensor] | None:
    """The keys and values of virtual tokens, computed with the weights that a traced model may not have."""
    if held is None or soft.count(live) == 0 or not generates(live, order.task):
        return None
    with operated(order.model, *order.worn) as real:
        return computed(real)


def companions(order: Order, live: nn.Module, directory: Path) -> None:
    """The model's configuration, and what else travels with it where it comes from a directory."""
    if isinstance(order.model, str | Path):
        source = locate(order.model)
        carry(source, directory)
        said = merged_config(source, type(live).__name__, classes(live), dtype=order.dtype_word, untied=False)
        write_json(directory / "config.json", said)
        return
    own: Any = live
    said = own.config.to_dict()
    write_json(directory / "config.json", {**said, "dtype": order.dtype_word or said.get("dtype")})
    if own.can_generate():
        write_json(directory / "generation_config.json", own.generation_config.to_dict())


def compared(
    order: Order, made: Traced, graphs: Sequence[Path], listen: Listener, live: nn.Module | None = None
) -> Parity | None:
    """What `verified` finds of a model, which is loaded where it is not at hand; nothing where nobody asked.

    Raises:
        ParityError: they do not agree.
    """
    listen(Event("export", "verifying", 2, 3))
    if not order.verify:
        return None
    with operated(order.model, *order.worn) if live is None else nullcontext(live) as model:
        return verified(model, order, made, graphs)


def verified(live: nn.Module, order: Order, made: Traced, graphs: Sequence[Path]) -> Parity:
    """The comparison of what is in the files of one model's graphs with the live model.

    Torch computes in float32, from the weights as they were rounded: what is compared with is what the weights mean,
    and no other rounding of it.

    Raises:
        ParityError: they do not agree.
    """
    from peftsurgery.graph import parity
    from peftsurgery.graph.pair import opened

    runner = opened(graphs, packed=False)  # a few runs are not worth a second copy of every weight
    own = parity.tolerance(coarsest(live), widened=runner.widened)
    prefix = {**made.prefix, **made.apart}
    with exact(live), plain(live, order.task, prefix, form=order.prefix) as bare:
        found = parity.compare(
            runner,
            parity.torch_runner(live, bare.signature, bare.prefix),
            made.signature,
            accepted=own if order.tolerance is None else parity.Tolerance(order.tolerance),
        )
    return parity.check(found)


def report(
    live: nn.Module,
    order: Order,
    nbytes: int,
    made: Traced,
    parity: Parity | None,
    more: Mapping[str, Any] | None = None,
) -> Report:
    """The report of an export that wrote `nbytes`; `more` facts come last."""
    facts: dict[str, Any] = {
        "architecture": type(live).__name__,
        "form": order.form,
        "inputs": [port.name for port in made.signature.inputs],
        "outputs": [port.name for port in made.signature.outputs],
        "size": size(nbytes),
        "out": str(order.out),
        "parity": None if parity is None else parity.to_dict(),
        "remark": "" if parity is None else parity.remark,
        **made.facts,
        **(more or {}),
    }
    table = parity_table(parity) if parity is not None else ()
    headline = (
        "Exported; not compared with torch." if parity is None else f"Exported, and verified: {parity}."
    )
    return Report("export-onnx", headline, facts, table, hint=f"run {order.out}/model.onnx with ONNX Runtime")


def parity_table(parity: Parity) -> list[tuple[str, ...]]:
    """The rows of a comparison: one per output and shape, the keys and values of all layers together."""
    worst: dict[tuple[str, str], Row] = {}
    for row in parity.rows:
        output = row.output.split(".")[0]
        key = (output, f"{row.batch} × {row.length}" + (f" after {row.past}" if row.past else ""))
        if key not in worst or row.max_abs_diff > worst[key].max_abs_diff:
            worst[key] = row
    rows = [(*key, *_figures(row)) for key, row in worst.items()]
    return [("output", "batch × length", "max |difference|", "mean", "same top-1", "KL"), *rows]


def _figures(row: Row) -> tuple[str, ...]:
    decides = row.top1_agreement is not None and row.kl is not None
    decided = (f"{row.top1_agreement:.0%}", f"{row.kl:.1e}") if decides else ("", "")
    return f"{row.max_abs_diff:.1e}", f"{row.mean_abs_diff:.1e}", *decided
