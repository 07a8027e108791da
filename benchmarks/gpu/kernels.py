"""Write peftsurgery/graph/cuda_kernels.json.gz again, from the ONNX Runtime that is installed; takes a CUDA machine.

python -m benchmarks.gpu.kernels
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import onnxruntime as ort

from peftsurgery.graph import kernels
from peftsurgery.graph.session import CUDA

SOURCE = (
    "The CUDA kernels of onnxruntime-gpu {}, as onnxruntime.capi._pybind_state.get_all_opkernel_def() lists them "
    "where CUDA starts; `python -m benchmarks.gpu.kernels` writes this file again."
)


def listed() -> list[dict[str, object]]:
    """Every CUDA kernel; the registry crashes where the CUDA libraries are not found."""
    from onnxruntime.capi import _pybind_state

    own = (one for one in _pybind_state.get_all_opkernel_def() if one.provider == CUDA)
    return [
        {
            "op": one.op_name,
            "domain": one.domain,
            "since": one.version_range[0],
            "until": one.version_range[1],
            "types": {name: list(allowed) for name, allowed in one.type_constraints.items()},
        }
        for one in own
    ]


def main() -> None:
    ort.preload_dlls()
    said = {"source": SOURCE.format(ort.__version__), "onnxruntime": ort.__version__, "kernels": listed()}
    place = Path(kernels.__file__).with_name(kernels.DATA)
    place.write_bytes(gzip.compress(json.dumps(said, separators=(",", ":")).encode(), 9, mtime=0))
    print(f"{len(listed())} kernels of onnxruntime {ort.__version__} in {place}")


if __name__ == "__main__":
    main()
