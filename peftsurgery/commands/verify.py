"""verify: is what runs the thing that was trained?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftsurgery.adapter import check
from peftsurgery.commands.adapter_files import Adapters, gather
from peftsurgery.commands.export_onnx import operated
from peftsurgery.commands.report import Report
from peftsurgery.disk.locate import locate
from peftsurgery.errors import PlanError
from peftsurgery.events import Event, Listener, ignore
from peftsurgery.tasks import task as task_named

if TYPE_CHECKING:
    from torch import nn

    from peftsurgery.graph.parity import Runner
    from peftsurgery.graph.signature import Signature


def verify(
    model: nn.Module | str | Path,
    against: nn.Module | str | Path,
    *,
    adapters: Adapters = (),
    weight: Sequence[float] = (),
    task: str | None = None,
    tolerance: float | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    listen: Listener = ignore,
) -> Report:
    """Run two models on the same inputs, several batches and lengths, padded ones too, and compare.

    Args:
        model, against: each a live module, a model directory, an export's directory or an `.onnx` file.
        adapters: what `against` wears; grafted, not merged.
        weight: a factor for each adapter's effect.
        task: the task, where the files do not say it.
        tolerance: the largest absolute difference allowed; by default the wider dtype's.

    Raises:
        ParityError: they differ by more; it says at which output and by how much.
        PlanError: both are graphs, or an adapter comes with a graph.
    """
    from peftsurgery.graph import parity

    given = [check(a) for a in gather(adapters, weight, allow_pickle=allow_pickle)] if adapters else []
    listen(Event("verify", "loading", 0, 2))
    ...
