"""What can be compared, opened: a live model or a checkpoint in torch, with adapters, or a graph in ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peftsurgery.adapter import Adapter
from peftsurgery.commands.operating import operated
from peftsurgery.commands.prefixed import plain
from peftsurgery.disk.checkpoint import INDEX, SINGLE
from peftsurgery.disk.locate import locate
from peftsurgery.live.precision import coarsest, exact
from peftsurgery.reading import Reading

if TYPE_CHECKING:
    from torch import nn

    from peftsurgery.graph.parity import Runner
    from peftsurgery.graph.signature import Signature


@dataclass(frozen=True, slots=True)
class Worn:
    """What a model is opened with.

    Args:
        adapters: grafted, not merged.
        reading: how virtual tokens are read.
    """

    adapters: list[Adapter]
    task: str | None
    trust_remote_code: bool
    reading: Reading


@dataclass(frozen=True, slots=True)
class Side:
    """One of two models that are compared.

    Args:
        name: what to call it.
        run: from inputs by name to outputs by name.
        signature: its inputs and outputs.
        dtype: that of its weights, which a graph computes in too.
        home: the directory that it comes from, where a tokenizer may be.
        live: the module, where it is one.
        files: of its graphs, where it is graphs.
    """

    name: str
    run: Runner
    signature: Signature
    dtype: torch.dtype
    home: Path | None
    live: nn.Module | None = None
    files: tuple[Path, ...] = ()

    def layers(self) -> Runner:
        """What runs it and gives what its layers give, by their names.

        Raises:
            ExportError: a graph does not say which of its values those are.
        """
        from peftsurgery.graph import parting

        return parting.told_in(self.files) if self.live is None else parting.told_by(self.live, self.run)


def graphs_of(model: nn.Module | str | Path) -> tuple[Path, ...]:
    """The `.onnx` files that `model` is, or holds."""
    from peftsurgery.graph.pair import graphs

    return graphs(Path(model)) if isinstance(model, str | Path) else ()


def holds_checkpoint(model: nn.Module | str | Path) -> bool:
    """Whether a directory holds a checkpoint, be there a graph beside it or not."""
    return isinstance(model, str | Path) and any((Path(model) / name).is_file() for name in (SINGLE, INDEX))


@contextmanager
def opened_model(model: nn.Module | str | Path, worn: Worn) -> Iterator[Side]:
    """A live model or a model directory as a side, computing in float32; a live one is as before afterwards.

    Raises:
        UnsupportedModel, PlanError, AdapterError, CheckpointError.
    """
    from peftsurgery.graph import parity

    words = worn.adapters, True, worn.task, worn.trust_remote_code, worn.reading
    with ExitStack() as stack:
        live = stack.enter_context(operated(model, *words))
        dtype = coarsest(live)
        stack.enter_context(exact(live))
        bare = stack.enter_context(plain(live, worn.task))
        run = parity.torch_runner(live, bare.signature, bare.prefix)
        home = locate(model) if isinstance(model, str | Path) else None
        name = str(model) if isinstance(model, str | Path) else type(model).__name__
        yield Side(name, run, bare.signature, dtype, home, live)


def opened_graph(model: str | Path) -> Side:
    """A graph, or the two of an encoder-decoder, as a side.

    Raises:
        ExportError: ONNX Runtime refuses it, or it does not say what its inputs are.
    """
    from peftsurgery.graph.pair import opened

    files = graphs_of(model)
    session = opened(files)
    said = session.signature(config_of(files[0].parent))
    return Side(str(model), session, said, _dtype(said), files[0].parent, files=files)


def config_of(directory: Path) -> Mapping[str, Any]:
    """What the `config.json` in a directory says; nothing where there is none."""
    file = directory / "config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _dtype(said: Signature) -> torch.dtype:
    """The coarsest dtype of what comes out of a graph."""
    floats = [port.torch_dtype for port in said.outputs if port.torch_dtype.is_floating_point]
    return max(floats, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)
