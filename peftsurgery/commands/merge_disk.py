"""merge MODEL ADAPTER -o OUT of a checkpoint: from files into files, whole or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from peftsurgery.adapter import Adapter
from peftsurgery.commands.companions import carry, merged_config
from peftsurgery.commands.fitting import fit
from peftsurgery.commands.provenance import PROVENANCE, provenance
from peftsurgery.commands.report import Report, size
from peftsurgery.disk.checkpoint import open_checkpoint
from peftsurgery.disk.durable import staged, write_json
from peftsurgery.disk.locate import locate
from peftsurgery.disk.merge import Merged, merge
from peftsurgery.dtypes import dtype_named
from peftsurgery.errors import PlanError
from peftsurgery.events import Listener


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One merge of a checkpoint into a new directory.

    Args:
        model: the base, a directory or a hub id in the local cache.
        adapters: what is folded into it, scaled and checked.
        out: the directory that it becomes.
        untie: whether a tied weight that the adapters change gets a copy of its own.
        task, dtype: those of the merged model, where they are not the adapters' and the base's.
        max_shard_size: bytes of tensors in a file; the base's own files by default.
        device: where folding is computed.
    """

    model: str | Path
    adapters: tuple[Adapter, ...]
    out: Path
    untie: bool = False
    task: str | None = None
    dtype: str | None = None
    max_shard_size: int | None = None
    device: str = "cpu"
    trust_remote_code: bool = False


def merge_disk(job: Job, listen: Listener) -> Report:
    """Do it: `out` is whole, or as it was; see `merge`."""
    base = locate(job.model)
    check_apart(base, job.out)
    checkpoint = open_checkpoint(base)
    plan = fit(
        checkpoint, job.adapters, task=job.task, untie=job.untie, trust_remote_code=job.trust_remote_code
    )
    wanted, becomes = dtype_named(job.dtype), plan.blueprint
    with staged(job.out) as directory:
        done = merge(
            checkpoint,
            plan.adapters,
            directory,
            rename=plan.rename,
            twins=plan.twins,
            dtype=wanted,
            max_shard_size=job.max_shard_size,
            device=job.device,
            listen=listen,
        )
        carry(base, directory)
        said = merged_config(
            base, becomes.architecture, becomes.classes, dtype=job.dtype, untied=bool(plan.twins)
        )
        write_json(directory / "config.json", said)
        write_json(directory / PROVENANCE, provenance(job.model, job.adapters, done.folded, done.added))
    return _report(job, done, becomes.architecture)


def check_apart(base: Path, out: Path) -> None:
    """Refuse to write over the base.

    Raises:
        PlanError: `out` is the base, or holds it.
    """
    inside = out.resolve()
    if inside == base.resolve() or inside in base.resolve().parents:
        raise PlanError(f"{out} is the model itself; a merge never overwrites its base. Give another `-o`.")


def _report(job: Job, done: Merged, architecture: str) -> Report:
    facts = {
        "model": str(job.model),
        "adapters": [adapter.name for adapter in job.adapters],
        "architecture": architecture,
        "folded": len(done.folded),
        "added": list(done.added),
        "size": size(done.nbytes),
        "tensors": list(done.folded),
        "out": str(job.out),
    }
    headline = f"Merged into {len(done.folded)} of {done.num_tensors} tensors."
    return Report("merge", headline, facts, hint=f"peftsurgery export-onnx {job.out} -o ONNX_DIR")
