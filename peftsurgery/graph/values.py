"""Arrays as ONNX Runtime holds them, in a dtype that numpy may not have."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

BFLOAT16 = "tensor(bfloat16)"
FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
"""numpy's dtypes of ONNX Runtime's."""


def held(array: npt.NDArray[Any], kind: str) -> Any:
    """The array as an OrtValue; a float gets the dtype that `kind` says, in ONNX Runtime's words.

    It lies on the CPU. ONNX Runtime copies it to the device that reads it.
    """
    import onnxruntime as ort

    if kind == BFLOAT16:
        return ort.OrtValue.from_dlpack(
            torch.from_numpy(np.ascontiguousarray(array, np.float32)).to(torch.bfloat16)
        )
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array, FLOATS.get(kind, array.dtype)))


def array(value: Any) -> npt.NDArray[Any]:
    """What an OrtValue holds; bfloat16 as float32, which holds it exactly."""
    if value.data_type() != BFLOAT16:
        found: npt.NDArray[Any] = value.numpy()
        return found
    widened: npt.NDArray[Any] = torch.utils.dlpack.from_dlpack(value).float().cpu().numpy()
    return widened
