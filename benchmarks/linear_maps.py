"""What a linear map costs whose weight a graph reads as the checkpoint stores it, (out, in), in ONNX Runtime.

python -m benchmarks.linear_maps

Eight maps in a row, up and down between two widths, each with a bias, in float32 on one thread. The forms take turns on
the same input. What counts is the first quartile of a form's times over that of MatMul with a weight that was
transposed before it was written, which is what copied weights have. Prepacking, ONNX Runtime's default, copies every
matrix when the graph is loaded; without it the weights stay in the file.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results" / "linear_maps.json"
WIDTHS = ((384, 1536), (1024, 2816))
BATCHES = ((1, 1), (1, 16), (1, 128), (8, 128))
MAPS = 8
SECONDS = 6.0
FORMS = ("MatMul, transposed before", "FusedMatMul", "Reshape, Gemm, Reshape", "Transpose, MatMul")


def graph(form: str, widths: tuple[int, int]) -> bytes:
    """Eight maps in a row, the same weights in every form."""
    random, nodes, held = np.random.default_rng(0), list[Any](), list[Any]()
    for number in range(MAPS):
        depth, width = widths if number % 2 == 0 else widths[::-1]
        weight = random.standard_normal((width, depth), np.float32) / np.float32(depth) ** 0.5
        given = {"bias": random.standard_normal(width, np.float32), "weight": weight}
        given |= {"flat": np.array([-1, depth]), "width": np.array([width])}
        if form == FORMS[0]:
            given["weight"] = np.ascontiguousarray(weight.T)
        held += [numpy_helper.from_array(value, f"{word}{number}") for word, value in given.items()]
        nodes += linear(form, number)
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "length", widths[0]])
        for name in ("y0", f"y{MAPS}")
    ]
    made = helper.make_graph(nodes, "maps", ports[:1], ports[1:], held)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return bytes(helper.make_model(made, opset_imports=opsets, ir_version=10).SerializeToString())


def linear(form: str, n: int) -> list[Any]:
    """The nodes of one map, from `y<n>` to `y<n + 1>`."""
    x, y, weight, bias = f"y{n}", f"y{n + 1}", f"weight{n}", f"bias{n}"
    add = helper.make_node("Add", [f"product{n}", bias], [y])
    if form == FORMS[0]:
        return [helper.make_node("MatMul", [x, weight], [f"product{n}"]), add]
    if form == FORMS[1]:
        fused = helper.make_node(
            "FusedMatMul", [x, weight], [f"product{n}"], domain="com.microsoft", transB=1
        )
        return [fused, add]
    if form == FORMS[3]:
        turned = helper.make_node("Transpose", [weight], [f"turned{n}"], perm=[1, 0])
        return [turned, helper.make_node("MatMul", [x, f"turned{n}"], [f"product{n}"]), add]
    return [
        helper.make_node("Reshape", [x, f"flat{n}"], [f"matrix{n}"]),
        helper.make_node("Gemm", [f"matrix{n}", weight, bias], [f"product{n}"], transB=1),
        helper.make_node("Shape", [x], [f"leading{n}"], end=-1),
        helper.make_node("Concat", [f"leading{n}", f"width{n}"], [f"shape{n}"], axis=0),
        helper.make_node("Reshape", [f"product{n}", f"shape{n}"], [y]),
    ]


def session(form: str, widths: tuple[int, int], prepacking: bool) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.add_session_config_entry("session.disable_prepacking", str(int(not prepacking)))
    return ort.InferenceSession(graph(form, widths), options, providers=["CPUExecutionProvider"])


def ratios(sessions: dict[str, ort.InferenceSession], batch: tuple[int, int], width: int) -> dict[str, float]:
    """Each form's first quartile over that of the first form, which is given in milliseconds."""
    x = np.random.default_rng(1).standard_normal((*batch, width), np.float32)
    times: dict[str, list[float]] = {form: [] for form in sessions}
    answers = {form: one.run(None, {"y0": x})[0] for form, one in sessions.items()}
    for form, answer in answers.items():
        assert np.allclose(answer, answers[FORMS[0]], rtol=1e-3, atol=1e-3), form
    until = time.perf_counter() + SECONDS
    while time.perf_counter() < until or len(times[FORMS[0]]) < 5:
        for form, one in sessions.items():
            start = time.perf_counter()
            one.run(None, {"y0": x})
            times[form].append(time.perf_counter() - start)
    quartile = {form: float(np.percentile(found, 25)) for form, found in times.items()}
    found = {form: quartile[form] / quartile[FORMS[0]] for form in FORMS[1:]}
    return {FORMS[0]: 1000 * quartile[FORMS[0]], **found}


def main() -> None:
    rows = []
    for widths in WIDTHS:
        for prepacking in (True, False):
            sessions = {form: session(form, widths, prepacking) for form in FORMS}
            for batch in BATCHES:
                found = ratios(sessions, batch, widths[0])
                rows.append({"widths": widths, "batch": batch, "prepacking": prepacking, "found": found})
    said = {"onnxruntime": ort.__version__, "cpus": os.cpu_count(), "rows": rows}
    RESULTS.write_text(json.dumps(said, indent=2) + "\n")
    table = Table(title="Linear maps: times over those of a weight that was transposed before")
    for column in ("widths", "batch × length", "prepacking", "MatMul, ms", *FORMS[1:]):
        table.add_column(column, justify="right")
    for row in rows:
        first, *others = row["found"].values()
        names = [" ↔ ".join(map(str, row["widths"])), " × ".join(map(str, row["batch"]))]
        table.add_row(
            *names, "yes" if row["prepacking"] else "no", f"{first:.2f}", *(f"{r:.2f}" for r in others)
        )
    Console().print(table)


if __name__ == "__main__":
    main()
