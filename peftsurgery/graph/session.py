"""Running a graph in ONNX Runtime, and saying on what."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from peftsurgery.errors import ExportError

Feeds = Mapping[str, npt.NDArray[Any]]
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
WORDS = {"cpu": CPU, "cuda": CUDA}


class Session:
    """One graph, ready to run.

    Args:
        path: the `.onnx` file.
        providers: where to run, best first: `cuda`, `cpu`, or ONNX Runtime's names. By default CUDA
            where it works, and the CPU otherwise.
        threads: for one operation; 0 lets ONNX Runtime choose.

    Raises:
        ExportError: a provider that was asked for does not work here, or ONNX Runtime refuses the graph.
    """

    def __init__(self, path: Path | str, providers: Sequence[str] | None = None, *, threads: int = 0) -> None:
        import onnxruntime as ort

        wanted = [WORDS.get(word, word) for word in providers or _default()]
        _available(wanted if providers else [])
        if CUDA in wanted:
            # The wheels of NVIDIA's libraries are found this way, and so are the ones beside torch.
            with redirect_stdout(sys.stderr):  # what it misses, it prints; stdout is for reports
                ort.preload_dlls()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(str(path), options, providers=wanted)
        except Exception as error:  # ONNX Runtime's own classes share no public base
            raise ExportError(f"ONNX Runtime refuses {path}: {_first(error)}. Export it anew.") from error
        if providers and self.provider != wanted[0]:
            raise ExportError(_unloaded(wanted[0]))

    @property
    def provider(self) -> str:
        """Where it really runs, in ONNX Runtime's word."""
        return self._session.get_providers()[0]  # type: ignore[no-any-return]

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the inputs, in order."""
        return tuple(port.name for port in self._session.get_inputs())

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the outputs, in order."""
        return tuple(port.name for port in self._session.get_outputs())

    def run(self, feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
        """The outputs by name; a feed that the graph does not take is left out."""
        given = {name: np.ascontiguousarray(feeds[name]) for name in self.inputs}
        return dict(zip(self.outputs, self._session.run(None, given), strict=True))

    def __call__(self, feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
        return self.run(feeds)


def _default() -> list[str]:
    import onnxruntime as ort

    return [CUDA, CPU] if CUDA in ort.get_available_providers() and _has_driver() else [CPU]


def _has_driver() -> bool:
    """Whether NVIDIA's driver is here: the CUDA build of ONNX Runtime names its provider on every machine."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def _available(wanted: Sequence[str]) -> None:
    import onnxruntime as ort

    here = ort.get_available_providers()
    lost = [name for name in wanted if name not in here]
    if lost == [CUDA]:
        raise ExportError(
            f"The installed onnxruntime {ort.__version__} has no CUDA provider. Uninstall `onnxruntime` and "
            "install `onnxruntime-gpu[cuda,cudnn]`, or run on the CPU (`providers=['cpu']`)."
        )
    if lost:
        raise ExportError(f"The installed onnxruntime has no {lost[0]}. It has {', '.join(here)}.")


def _unloaded(provider: str) -> str:
    return (
        f"{provider} was asked for and did not start: a library of CUDA or cuDNN is missing, or no device is "
        "visible. Install `onnxruntime-gpu[cuda,cudnn]`, look at `nvidia-smi`, or run on the CPU "
        "(`providers=['cpu']`)."
    )


def _first(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
