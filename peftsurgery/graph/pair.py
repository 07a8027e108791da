"""Running an encoder and its decoder in ONNX Runtime as one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from peftsurgery.errors import ExportError
from peftsurgery.graph.inputs import Array
from peftsurgery.graph.seq2seq import DECODER, ENCODER, MASK, OWN, SINGLE
from peftsurgery.graph.session import Feeds, Session
from peftsurgery.graph.signature import BATCH, TARGET, WRITTEN, Port, Signature


class Pair:
    """The two graphs of an encoder-decoder, ready to run: a callable from inputs by name to outputs by name.

    Args:
        encoder, decoder: their files.
        providers: where to run, as in `Session`.
        threads: that one operation may use; 0 lets ONNX Runtime choose.
        reveal: values inside of the two graphs that come out too.
        packed: as in `Session`.

    Raises:
        ExportError: as `Session` does.
    """

    def __init__(
        self,
        encoder: Path,
        decoder: Path,
        providers: Sequence[str] | None = None,
        *,
        threads: int = 0,
        reveal: tuple[Sequence[str], Sequence[str]] = ((), ()),
        packed: bool = True,
    ) -> None:
        self.encoder = Session(encoder, providers, threads=threads, reveal=reveal[0], packed=packed)
        self.decoder = Session(decoder, providers, threads=threads, reveal=reveal[1], packed=packed)
        self.provider, self.remark = self.decoder.provider, self.decoder.remark
        self.widened = self.decoder.widened

    def read(self, feeds: Feeds) -> dict[str, Any]:
        """What the decoder needs of the source texts, and an empty past; `input_ids` and `attention_mask` in.

        Keys and values stay on the device. `last_hidden_state`, which the decoder does not need, comes too.
        """
        hidden, crossed = self.encoder.step(feeds, {})
        rows = len(feeds["input_ids"])
        empty = {
            word: np.zeros((rows, heads, 0, width), np.float32)
            for word, (heads, width) in self.decoder.past_ports().items()
            if f".{OWN}." in word
        }
        return {**crossed, **empty, MASK: feeds["attention_mask"], "last_hidden_state": hidden}

    def write(self, state: Mapping[str, Any], tokens: Array) -> tuple[Array, dict[str, Any]]:
        """The logits of the next tokens, (rows, tokens, vocabulary), and the state with them in its past."""
        logits, own = self.decoder.step({"input_ids": tokens}, state)
        return logits, {**state, **own}

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """The outputs of the whole model: the decoder reads its input in two steps, so that its past is used."""
        state, target = self.read(feeds), feeds[TARGET]
        cut = (target.shape[1] + 1) // 2
        first, state = self.write(state, target[:, :cut])
        rest = [] if cut == target.shape[1] else [self.write(state, target[:, cut:])[0]]
        return {
            "encoder_last_hidden_state": state["last_hidden_state"],
            "logits": np.concatenate([first, *rest], axis=1),
        }

    def signature(self, config: Mapping[str, Any] | None = None) -> Signature:
        """What the two say of themselves as one model (see `Session.signature`)."""
        reads, writes = self.encoder.signature(config), self.decoder.signature(config)
        hidden = next(port for port in reads.outputs if port.name == "last_hidden_state")
        logits = next(port for port in writes.outputs if port.name == "logits")
        return replace(
            reads,
            inputs=(*reads.inputs, Port(TARGET, "int64", (BATCH, WRITTEN))),
            outputs=(replace(hidden, name="encoder_last_hidden_state"), logits),
        )

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        return self.run(feeds)


def graphs(place: Path) -> tuple[Path, ...]:
    """The graphs of one model: an `.onnx` file, or those that a directory holds; none where it holds none.

    Either of the two files of an encoder-decoder stands for both.
    """
    if place.suffix == ".onnx" and place.name not in (ENCODER, DECODER):
        return (place,)
    directory = place.parent if place.suffix == ".onnx" else place
    found = [directory / name for name in (SINGLE, ENCODER, DECODER) if (directory / name).is_file()]
    return (directory / SINGLE,) if directory / SINGLE in found else tuple(found) if len(found) == 2 else ()


def opened(
    files: Sequence[Path],
    providers: Sequence[str] | None = None,
    *,
    threads: int = 0,
    packed: bool = True,
    cuda_graph: bool = False,
) -> Session | Pair:
    """What runs the graphs of one model.

    Args:
        providers, threads, packed, cuda_graph: see `Session`; an encoder-decoder is no CUDA graph.

    Raises:
        ExportError: as `Session` does.
    """
    if len(files) == 1:
        return Session(files[0], providers, threads=threads, packed=packed, cuda_graph=cuda_graph)
    if cuda_graph:
        raise ExportError(
            f"{files[1]} writes: its keys and values grow with every token, and a CUDA graph has one size. "
            "Leave it out."
        )
    return Pair(files[0], files[1], providers, threads=threads, packed=packed)
