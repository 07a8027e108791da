"""Runs that CUDA replays as one graph of kernels, instead of launching them one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from peftsurgery.errors import ExportError
from peftsurgery.graph.inputs import Array, long
from peftsurgery.graph.values import BFLOAT16, FLOATS, array

DEVICE = "cuda"
"""Where inputs and outputs lie."""
NUMBER = "gpu_graph_id"
"""ONNX Runtime's word for which of a session's CUDA graphs a run is of."""


class Recording(NamedTuple):
    """The inputs and outputs of one batch and length; CUDA has their addresses, so they stay where they are."""

    binding: Any
    options: Any
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]


class Captured:
    """The runs of a session whose option `enable_cuda_graph` is set.

    Each batch and length is recorded at its first run, and keeps the memory that it took.

    Args:
        session: ONNX Runtime's, on CUDA.

    Raises:
        ExportError: an input is in bfloat16, which cannot be copied to where the last one was.
    """

    def __init__(self, session: Any) -> None:
        self._session = session
        self._recordings: dict[tuple[tuple[int, ...], ...], Recording] = {}
        narrow = [port.name for port in session.get_inputs() if port.type == BFLOAT16]
        if narrow:
            raise ExportError(
                f"{narrow[0]!r} is in bfloat16, which numpy does not have, so a CUDA graph cannot be fed. "
                "Export in float16, or leave CUDA graphs out."
            )

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs by name.

        Raises:
            ExportError: the size of an output is not told by those of the inputs.
        """
        given = {
            port.name: np.ascontiguousarray(feeds[port.name], FLOATS.get(port.type))
            for port in self._session.get_inputs()
        }
        shapes = tuple(value.shape for value in given.values())
        if shapes not in self._recordings:
            self._recordings[shapes] = self._recorded(given)
        known = self._recordings[shapes]
        for name, value in given.items():
            known.inputs[name].update_inplace(value)
        self._session.run_with_iobinding(known.binding, known.options)
        return {name: array(value) for name, value in known.outputs.items()}

    def _recorded(self, given: Mapping[str, Array]) -> Recording:
        import onnxruntime as ort

        inputs = {name: ort.OrtValue.ortvalue_from_numpy(value, DEVICE, 0) for name, value in given.items()}
        outputs = self._outputs(given)
        binding, options = self._session.io_binding(), ort.RunOptions()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        options.add_run_config_entry(NUMBER, str(len(self._recordings) + 1))
        return Recording(binding, options, inputs, outputs)

    def _outputs(self, given: Mapping[str, Array]) -> dict[str, Any]:
        """Empty outputs of the sizes that the inputs' named axes tell."""
        import onnx_ir as ir
        import onnxruntime as ort

        sizes = {
            axis: size
            for port in self._session.get_inputs()
            for axis, size in zip(port.shape, given[port.name].shape, strict=True)
            if isinstance(axis, str)
        }
        made = {}
        for port in self._session.get_outputs():
            try:
                shape = [long(axis, sizes) for axis in port.shape]
            except KeyError as lost:
                raise ExportError(
                    f"The size of {port.name!r} is {lost.args[0]!r}, which no input tells, so a CUDA graph has no "
                    "memory for it. Leave CUDA graphs out."
                ) from lost
            kind = ir.DataType[port.type.removeprefix("tensor(").removesuffix(")").upper()]
            made[port.name] = ort.OrtValue.ortvalue_from_shape_and_type(shape, int(kind), DEVICE, 0)
        return made
