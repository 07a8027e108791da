"""Running a graph in ONNX Runtime, and saying on what."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy.typing as npt

from peftsurgery.errors import ExportError
from peftsurgery.graph import cache, precision
from peftsurgery.graph.captured import Captured
from peftsurgery.graph.layers import revealed
from peftsurgery.graph.limits import longest
from peftsurgery.graph.signature import BATCH, LENGTH, RECORDED, Port, Signature
from peftsurgery.graph.values import array, held

Feeds = Mapping[str, npt.NDArray[Any]]
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
WORDS = {"cpu": CPU, "cuda": CUDA}
ERRORS, FATAL, USUAL = 3, 4, 2
"""ONNX Runtime's log levels."""
FOLDER = "session.model_external_initializers_file_folder_path"
"""Where a graph that comes as bytes finds its weights."""
WIDENED = "ONNX Runtime's CPU has no bfloat16 arithmetic: it ran in float32, from the bfloat16 weights."


class Session:
    """One graph, ready to run: a callable from inputs by name to outputs by name.

    Args:
        path: the `.onnx` file.
        providers: where to run, best first: `cuda`, `cpu`, or ONNX Runtime's own names. By default
            CUDA where it works, and the CPU otherwise.
        threads: that one operation may use; 0 lets ONNX Runtime choose.
        reveal: values inside of the graph that come out too.
        packed: copy every matrix into the order that the processor likes, as ONNX Runtime does unless told otherwise;
            without it weights in files are mapped and take no memory of their own.
        cuda_graph: let CUDA record the kernels of a run and replay them at once; of every batch and length the first
            run is recorded, and keeps its memory. For graphs without a cache.

    Attributes:
        provider: where it really runs, in ONNX Runtime's word.
        remark: why it does not run on CUDA, where the installed ONNX Runtime could, or not in the graph's dtype.
        widened: whether it runs in float32, because ONNX Runtime's CPU has no bfloat16.

    Raises:
        ExportError: a provider that was asked for does not work here, ONNX Runtime refuses the graph, or it cannot be
            a CUDA graph.
    """

    def __init__(
        self,
        path: Path | str,
        providers: Sequence[str] | None = None,
        *,
        threads: int = 0,
        reveal: Sequence[str] = (),
        packed: bool = True,
        cuda_graph: bool = False,
    ) -> None:
        wanted = _asked(providers) if providers else _default()
        if cuda_graph and wanted[0] != CUDA:
            raise ExportError(f"A CUDA graph does not run on {wanted[0]}. Name `cuda`, or leave it out.")
        options = _options(threads, packed)
        self._session, said, self.widened = _open(Path(path), wanted, options, reveal, cuda_graph)
        self.provider: str = self._session.get_providers()[0]
        unloaded = "" if self.provider == wanted[0] else _unloaded(wanted[0], said)
        if (providers or cuda_graph) and unloaded:
            raise ExportError(unloaded)
        self.remark = " ".join(filter(None, [unloaded, WIDENED if self.widened else ""]))
        self._captured = self._capturing(path) if cuda_graph else None

    def run(self, feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
        """The outputs by name; a feed that the graph does not take is left out, and a float gets its port's dtype.

        numpy has no bfloat16: what comes out in it is float32 here, which holds it exactly.

        Raises:
            ExportError: an input of the graph is not fed.
        """
        ports = self._session.get_inputs()
        lost = [port.name for port in ports if port.name not in feeds]
        if lost:
            raise ExportError(
                f"The graph takes {lost[0]!r}, and the feeds are {', '.join(feeds)}. Feed it too."
            )
        if self._captured is not None:
            return self._captured.run(feeds)
        given = {port.name: held(feeds[port.name], port.type) for port in ports}
        outputs = [port.name for port in self._session.get_outputs()]
        found = self._session.run_with_ort_values(None, given)
        return {name: array(value) for name, value in zip(outputs, found, strict=True)}

    def _capturing(self, path: Path | str) -> Captured:
        if self.past_ports():
            raise ExportError(
                f"{path} is a decoder's: its keys and values grow with every token, and a CUDA graph has one size. "
                "Leave it out."
            )
        return Captured(self._session)

    def step(self, feeds: Feeds, past: Mapping[str, Any]) -> tuple[npt.NDArray[Any], dict[str, Any]]:
        """The first output of new tokens behind a `past`, and the others, which stay on the device.

        Keys and values come under the names of the inputs that they are for: they are the past of the next step.

        Args:
            feeds: arrays by name; one that the graph does not take is left out.
            past: by the names of the inputs: arrays, or what a step before gave.

        Raises:
            ExportError: the session is of CUDA graphs, which have no steps.
        """
        if self._captured is not None:
            raise ExportError(
                "A CUDA graph runs whole batches, and no steps. Call `run`, or open without it."
            )
        import onnxruntime as ort

        device = "cuda" if self.provider == CUDA else "cpu"
        binding, given = self._session.io_binding(), {**feeds, **past}
        bound = {  # held until the run is over: a value made of an array does not keep it
            port.name: value
            if isinstance(value := given[port.name], ort.OrtValue)
            else held(value, port.type)
            for port in self._session.get_inputs()
        }
        for name, value in bound.items():
            binding.bind_ortvalue_input(name, value)
        names = [port.name for port in self._session.get_outputs()]
        for name in names:
            binding.bind_output(name, "cpu" if name == names[0] else device)
        self._session.run_with_iobinding(binding)
        first, *others = binding.get_outputs()
        return array(first), {
            cache.past_of(name): value for name, value in zip(names[1:], others, strict=True)
        }

    def past_ports(self) -> dict[str, tuple[int, int]]:
        """For each key and value that goes in: its heads and its head width."""
        return self._past

    @cached_property
    def _past(self) -> dict[str, tuple[int, int]]:
        # Kept, for every step of a text asks for it.
        ports = (_port(port, {}) for port in self._session.get_inputs())
        return {p.name: (int(p.axes[1]), int(p.axes[3])) for p in ports if cache.is_cached([p.name])}

    def __call__(self, feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
        return self.run(feeds)

    def signature(self, config: Mapping[str, Any] | None = None) -> Signature:
        """What the graph says of itself; the model's `config.json` fills in what it does not.

        Raises:
            ExportError: the size of the vocabulary is said nowhere.
        """
        said = {**(config or {}), **self._recorded()}
        if "vocab_size" not in said:
            raise ExportError("The graph does not say its vocab_size. Put the model's config.json beside it.")
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        axes = {
            n: word for n, word in zip(inputs[0].shape, (BATCH, LENGTH), strict=False) if isinstance(n, str)
        }
        pad = int(said.get("pad_id", said.get("pad_token_id")) or 0)
        return Signature(
            inputs=tuple(_port(port, axes) for port in inputs),
            outputs=tuple(_port(port, axes) for port in outputs),
            task=str(said.get("task", "")),
            vocab_size=int(said["vocab_size"]),
            pad_id=pad,
            type_vocab_size=int(said.get("type_vocab_size") or 1),
            longest=int(said.get("longest", longest(said.get("max_position_embeddings"), pad + 1))),
            start_id=int(said.get("start_id", said.get("decoder_start_token_id") or pad)),
        )

    def _recorded(self) -> dict[str, str]:
        facts = self._session.get_modelmeta().custom_metadata_map
        return {
            name.removeprefix(RECORDED): fact for name, fact in facts.items() if name.startswith(RECORDED)
        }


def _default() -> list[str]:
    import onnxruntime as ort

    return [name for name in (CUDA, CPU) if name in ort.get_available_providers()]


def _asked(words: Sequence[str]) -> list[str]:
    import onnxruntime as ort

    here, wanted = ort.get_available_providers(), [WORDS.get(word.lower(), word) for word in words]
    lost = [name for name in wanted if name not in here]
    if CUDA in lost:
        raise ExportError(
            f"The installed onnxruntime {ort.__version__} is built for the CPU alone. Uninstall it and "
            "install `onnxruntime-gpu[cuda,cudnn]`, or run on the CPU (`providers=['cpu']`)."
        )
    if lost:
        raise ExportError(f"The installed onnxruntime has no {lost[0]}. It has {', '.join(here)}.")
    return wanted


def _means(wanted: Sequence[str], cuda_graph: bool) -> list[Any]:
    """The providers as ONNX Runtime takes them, with their options."""
    own = {CUDA: {"enable_cuda_graph": "1"}} if cuda_graph else {}
    return [(name, own[name]) if name in own else name for name in wanted]


def _options(threads: int, packed: bool) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = ERRORS
    options.add_session_config_entry("session.disable_prepacking", str(int(not packed)))
    return options


def _open(
    path: Path, wanted: list[str], options: Any, reveal: Sequence[str], cuda_graph: bool
) -> tuple[Any, str, bool]:
    """The session, what ONNX Runtime printed, and whether it runs in float32 for want of bfloat16."""
    import onnxruntime as ort

    source, means = revealed(path.read_bytes(), reveal) if reveal else str(path), _means(wanted, cuda_graph)
    if reveal:
        options.add_session_config_entry(FOLDER, str(path.resolve().parent))
    with _captured() as said:
        if CUDA in wanted:
            # Finds the libraries in the wheels that `onnxruntime-gpu[cuda,cudnn]` brings, and those of torch.
            ort.preload_dlls()
        try:
            return ort.InferenceSession(source, options, providers=means), said.getvalue(), False
        except Exception as error:  # ONNX Runtime's errors have no public base
            if "NOT_IMPLEMENTED" in str(error) and CPU in wanted and precision.is_bfloat16(path):
                return _widened(path, options, reveal), said.getvalue(), True
            raise ExportError(
                f"ONNX Runtime refuses {path}: {_first(str(error))} "
                "Name another provider, or export in float32."
            ) from error


def _widened(path: Path, options: Any, reveal: Sequence[str]) -> Any:
    """The graph on the CPU, which has no bfloat16 operations, in float32 with the same weights."""
    import onnxruntime as ort

    options.add_session_config_entry(FOLDER, str(path.resolve().parent))
    return ort.InferenceSession(revealed(precision.widened(path), reveal), options, providers=[CPU])


@contextmanager
def _captured() -> Iterator[io.StringIO]:
    """What ONNX Runtime prints and logs about providers that do not start, which `remark` says better."""
    import onnxruntime as ort

    ort.set_default_logger_severity(FATAL)
    try:
        with redirect_stdout(io.StringIO()) as said:
            yield said
    finally:
        ort.set_default_logger_severity(USUAL)


def _unloaded(provider: str, said: str) -> str:
    reasons = [line.strip() for line in said.splitlines() if "Failed to load" in line or "failure" in line]
    why = reasons[0] if reasons else "no device is visible, or a library of CUDA or cuDNN is missing"
    return (
        f"{provider} did not start: {why}. Install `onnxruntime-gpu[cuda,cudnn]` and look at `nvidia-smi`, "
        "or run on the CPU (`providers=['cpu']`)."
    )


def _port(node: Any, axes: Mapping[Any, str]) -> Port:
    kind = node.type.removeprefix("tensor(").removesuffix(")")
    return Port(
        node.name, {"float": "float32"}.get(kind, kind), tuple(axes.get(axis, axis) for axis in node.shape)
    )


def _first(text: str) -> str:
    return (text.strip().splitlines() or ["it gives no reason."])[0]
