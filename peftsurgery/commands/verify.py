"""verify: is what runs the thing that was trained?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from peftsurgery.commands import texts as spoken
from peftsurgery.commands.adapter_files import Adapters, gather, given
from peftsurgery.commands.judging import Found, judged
from peftsurgery.commands.report import Report
from peftsurgery.commands.sides import (
    Side,
    Worn,
    graphs_of,
    holds_checkpoint,
    opened_graph,
    opened_model,
)
from peftsurgery.errors import PlanError, listing
from peftsurgery.events import Event, Listener, ignore
from peftsurgery.reading import AS_PEFT, Reading

if TYPE_CHECKING:
    from torch import nn

    from peftsurgery.graph.greedy import Agreement
    from peftsurgery.graph.signature import Signature


def verify(
    model: nn.Module | str | Path,
    against: nn.Module | str | Path,
    *,
    adapters: Adapters = (),
    weight: Sequence[float] = (),
    task: str | None = None,
    tolerance: float | None = None,
    texts: str | Path | None = None,
    new_tokens: int = 16,
    layers: bool = False,
    bits: bool = False,
    sample: int | None = None,
    reading: Reading = AS_PEFT,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    listen: Listener = ignore,
) -> Report:
    """Run two models on the same inputs and compare: texts, and random tokens of several batches and lengths, padded.

    Either may be a live module, a model directory, an export's directory or an `.onnx` file. Of a directory that holds
    both, `model` means the graph and `against` the checkpoint. Outputs per token are compared where tokens are
    attended. What writes text also goes on with the texts, always by the likeliest token; how many of those agree is
    told and is no reason to fail, for where two tokens are as likely the dtype's rounding chooses.

    Args:
        against: what `model` should equal.
        adapters: what `against` wears, or `model` where `against` is a graph; grafted, not merged.
        weight: a factor for each adapter's effect.
        task: the task, where the files do not say it.
        tolerance: the largest absolute difference allowed; by default that of the wider-rounding dtype.
        texts: a file, one text a line; without it a few built-in ones, where a model brings a tokenizer.
        new_tokens: how many tokens are written.
        layers: compare what every layer gives too, and tell the first that differs by more than the tolerance, or by
            more than that part of a value above 1.
        bits: run nothing; make every tensor of a merged checkpoint again from base and adapters, and compare bits.
        sample: with `bits`, how many touched and how many other tensors to compare; all by default.
        reading: how virtual tokens are read, where it is not as in PEFT.

    Raises:
        ParityError: they differ by more; it says at which output and by how much, and has the report.
        PlanError: adapters between two graphs, models that take different inputs, texts that cannot be read,
            no layers in common, or `bits` are asked of what is no checkpoint.
        ExportError: a graph does not say which of its values are its layers'.
    """
    if bits or sample is not None:
        return _bits(model, against, adapters, weight, task, sample, allow_pickle, trust_remote_code, listen)
    given = gather(adapters, weight, allow_pickle=allow_pickle) if adapters else []
    listen(Event("verify", "loading", 0, 2))
    worn = Worn(given, task, trust_remote_code, reading)
    with _sides(model, against, worn) as (left, right):
        listen(Event("verify", "comparing", 1, 2))
        return judged(left, right, _compared(left, right, tolerance, texts, new_tokens, layers))


def _bits(
    model: nn.Module | str | Path,
    against: nn.Module | str | Path,
    adapters: Adapters,
    weight: Sequence[float],
    task: str | None,
    sample: int | None,
    allow_pickle: bool,
    trust_remote_code: bool,
    listen: Listener,
) -> Report:
    from peftsurgery.commands.verify_merged import verify_merged

    if not isinstance(model, str | Path) or not isinstance(against, str | Path):
        raise PlanError("`bits` compares directories. Save the model first, or leave `bits` out to run both.")
    listed = given(adapters, weight, allow_pickle=allow_pickle) if adapters else []
    return verify_merged(
        model,
        against,
        listed,
        weighted=bool(weight),
        task=task,
        sample=sample,
        trust_remote_code=trust_remote_code,
        listen=listen,
    )


@contextmanager
def _sides(
    model: nn.Module | str | Path, against: nn.Module | str | Path, worn: Worn
) -> Iterator[tuple[Side, Side]]:
    """Both, opened; what `against` is for is what `model` is loaded for."""
    graph = graphs_of(model)
    if holds_checkpoint(against) or not graphs_of(against):
        with opened_model(against, worn) as right:
            bare = replace(worn, adapters=[], task=right.signature.task, reading=AS_PEFT)
            with _opened(model, bare, bool(graph)) as left:
                yield left, right
        return
    assert isinstance(against, str | Path)
    if graph and worn.adapters:
        raise PlanError(
            f"{model} and {against} are graphs, which no adapter goes on. Compare with the model that wears it: "
            f"`peftsurgery verify {model} --against MODEL --adapter ADAPTER`."
        )
    right = opened_graph(against)
    with _opened(model, replace(worn, task=worn.task or right.signature.task or None), bool(graph)) as left:
        yield left, right


@contextmanager
def _opened(model: nn.Module | str | Path, worn: Worn, is_graph: bool) -> Iterator[Side]:
    if is_graph:
        assert isinstance(model, str | Path)
        yield opened_graph(model)
        return
    with opened_model(model, worn) as side:
        yield side


def _compared(
    left: Side,
    right: Side,
    tolerance: float | None,
    texts: str | Path | None,
    new_tokens: int,
    layers: bool,
) -> Found:
    from peftsurgery.graph import parity, parting
    from peftsurgery.graph.inputs import generated, of_tokens

    deep = (left.layers(), right.layers()) if layers else None
    said = _shared(left, right)
    homes = dict.fromkeys(side.home for side in (right, left) if side.home is not None)
    rows = spoken.rows(texts, homes, said.vocab_size)
    batches = [of_tokens(said, batch) for batch in spoken.batches(rows)]
    widest = max((parity.tolerance(side.dtype) for side in (left, right)), key=lambda one: one.of(1))
    accepted = widest if tolerance is None else parity.Tolerance(tolerance)
    found = parity.compare(left.run, right.run, said, batches=batches, accepted=accepted)
    by_layer = None if deep is None else parting.compare(*deep, [*generated(said), *batches], accepted)
    return Found(found, _written(left, right, said, rows, new_tokens), len(rows), by_layer)


def _shared(left: Side, right: Side) -> Signature:
    """The signature to compare by: that of `against`, unless only `model` is a torch model, which says more."""
    said, other = (left, right) if right.live is None and left.live is not None else (right, left)
    names, others = ({port.name for port in side.signature.inputs} for side in (said, other))
    if not others <= names:
        raise PlanError(
            f"{other.name} takes {listing(sorted(others - names))} and {said.name} does not. "
            "Compare models of one architecture and one task."
        )
    return said.signature


def _written(
    left: Side, right: Side, said: Signature, rows: list[list[int]], new_tokens: int
) -> Agreement | None:
    from peftsurgery.graph import greedy
    from peftsurgery.graph.inputs import generated, tokens_of

    if said.task not in greedy.WRITES or new_tokens < 1:
        return None
    prompts = rows[: spoken.TOGETHER] or tokens_of(next(generated(said, [(3, 8)])))
    return greedy.agreement(left.run, right.run, said, prompts, new_tokens)
