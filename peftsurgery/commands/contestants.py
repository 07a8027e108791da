"""Who runs against an export: the model in torch, compiled, and the graph that torch's own exporter makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from peftsurgery.errors import SurgeryError, UnsupportedModel, cause

if TYPE_CHECKING:
    from torch import nn

    from peftsurgery.graph.generation import Reader
    from peftsurgery.graph.inputs import Array
    from peftsurgery.graph.signature import Signature
    from peftsurgery.timing import Laps, Run

OURS, EAGER, COMPILED, STOCK = "ours", "torch", "torch.compile", "torch.onnx.export"


class Course(NamedTuple):
    """What all of them run: texts of one length, and what is written behind them; or images.

    Args:
        said: the inputs of the model.
        batch, length: rows, and tokens of each; every row but the first is padded. An image is of length 1.
        new_tokens: how many are written, where the model writes.
    """

    said: Signature
    batch: int
    length: int
    new_tokens: int

    @property
    def tokens(self) -> int | None:
        """Tokens of a row; None of images."""
        return None if self.said.sees else self.length

    @property
    def feeds(self) -> Mapping[str, Array]:
        from peftsurgery.graph.inputs import batch

        return batch(np.random.default_rng(0), self.said, self.batch, self.length)


class Contestants(NamedTuple):
    """Those that take part, each what `run_of` runs; and why others do not."""

    able: Mapping[str, Any]
    unable: Mapping[str, str]


def shape(batch: int, tokens: int | None) -> str:
    """A course in words."""
    if tokens is None:
        return f"{batch} {'image' if batch == 1 else 'images'}"
    return f"{batch} × {tokens}"


@contextmanager
def contestants(
    ours: Any, live: nn.Module | None, said: Signature, settings: Sessions
) -> Iterator[Contestants]:
    """Ours, and what the live model gives."""
    able, unable = {OURS: ours}, dict[str, str]()
    with TemporaryDirectory(prefix="bench-") as room:
        for name, make in _makers(live, said, settings, Path(room)):
            try:
                able[name] = make()
            except SurgeryError as error:
                unable[name] = str(error)
        yield Contestants(able, unable)


class Sessions(NamedTuple):
    """How sessions are opened: see `peftsurgery.graph.session.Session`."""

    providers: Sequence[str]
    threads: int
    cuda_graph: bool = False

    def open(self, files: Sequence[Path]) -> Any:
        from peftsurgery.graph.pair import opened

        return opened(files, self.providers or None, threads=self.threads, cuda_graph=self.cuda_graph)


def _makers(
    live: nn.Module | None, said: Signature, settings: Sessions, room: Path
) -> Iterator[tuple[str, Callable[[], Any]]]:
    from peftsurgery.graph.in_torch import Torch, TorchPair

    if live is None:
        return
    pair = _is_pair(said)
    yield EAGER, lambda: TorchPair(live) if pair else Torch(live, said)
    yield COMPILED, lambda: TorchPair(live, compiled=True) if pair else Torch(live, said, compiled=True)
    yield STOCK, lambda: _stock(live, said, settings, room / "model.onnx")


def _stock(live: nn.Module, said: Signature, settings: Sessions, file: Path) -> Any:
    from peftsurgery.graph import stock

    if _is_pair(said):
        raise UnsupportedModel("It makes no graph of an encoder-decoder that has a cache. It is left out.")
    stock.export(live, said, file)
    return settings.open([file])


def _is_pair(said: Signature) -> bool:
    from peftsurgery.graph.signature import SEQ2SEQ

    return said.task == SEQ2SEQ


def run_of(contestant: Any, course: Course) -> Run:
    """Reading the texts, and, where the model writes, writing behind them: a lap each."""
    feeds = course.feeds

    def run() -> Laps:
        start = perf_counter()
        read, first = _begin(contestant, course.said, feeds)
        middle = perf_counter()
        if read is None:
            return (middle - start,)
        for _ in range(course.new_tokens):
            first = read(first)[:, -1].argmax(-1)[:, None]
        return middle - start, perf_counter() - middle

    return run


def _begin(contestant: Any, said: Signature, feeds: Mapping[str, Array]) -> tuple[Reader | None, Array]:
    """Read the texts; what goes on with them, and the first tokens that it gets."""
    from peftsurgery.graph.generation import answering, continuing

    ids = feeds[said.inputs[0].name]
    if _is_pair(said):
        return answering(contestant, ids, feeds["attention_mask"]), ids[:, :1]
    if not contestant.past_ports():
        contestant.run(feeds)
        return None, ids
    read = continuing(contestant, feeds["attention_mask"])
    return read, read(ids)[:, -1].argmax(-1)[:, None]


def tried(able: Mapping[str, Any], course: Course) -> Contestants:
    """Those that run it; a compiler that is not there, or a graph that refuses it, is found out by running."""
    runs, lost = {}, {}
    for name, contestant in able.items():
        run = run_of(contestant, course)
        try:
            run()
        except SurgeryError:
            raise
        except Exception as error:  # torch.compile's and ONNX Runtime's errors share no base
            if name == OURS:
                raise
            lost[name] = f"{cause(error)}. It is left out of the comparison."
            continue
        runs[name] = run
    return Contestants(runs, lost)
