"""merge MODEL ADAPTER -o OUT of a checkpoint: from files into files, whole or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from peftsurgery import __version__
from peftsurgery.adapter import Adapter
from peftsurgery.commands.adapter_files import Given
from peftsurgery.commands.companions import carry, merged_config
from peftsurgery.commands.fitting import Fit, fit
from peftsurgery.commands.provenance import (
    PROVENANCE,
    Inputs,
    inputs,
    provenance,
    vanished,
)
from peftsurgery.commands.report import Report, size
from peftsurgery.disk.checkpoint import Checkpoint, open_checkpoint
from peftsurgery.disk.durable import write_json
from peftsurgery.disk.engines import Engine
from peftsurgery.disk.hashing import hashed
from peftsurgery.disk.locate import locate
from peftsurgery.disk.merge import Merged, Planned, finished, plan
from peftsurgery.disk.parts import written
from peftsurgery.disk.resumable import is_finished, resumable
from peftsurgery.disk.sharing import with_twins
from peftsurgery.disk.writer import ShardDone
from peftsurgery.dtypes import dtype_named
from peftsurgery.errors import PlanError
from peftsurgery.events import Listener
from peftsurgery.tally import EVERY, measured

CONFIG = "config.json"
OPTIONS = ("untie", "task", "dtype", "max_shard_size")
"""The words of a job that decide what the model is."""
OUTLINE = 2500
"""Bytes that a site of an adapter takes, without its parameters: measured with a LoRA on Llama's layers."""


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One merge of a checkpoint into a new directory.

    Args:
        model: the base, a directory or a hub id in the local cache.
        given: what is folded into it, checked.
        out: the directory that it becomes.
        untie: whether a tied weight that the adapters change gets a copy of its own.
        task, dtype: those of the merged model, where they are not the adapters' and the base's.
        max_shard_size: bytes of tensors in a file; the base's own files by default.
        device: where folding is computed.
        share_untouched: whether files of the base that no adapter touches are linked.
        resume: whether it goes on with what an interrupted one left.
        hash: whether every byte of the inputs is hashed.
    """

    model: str | Path
    given: tuple[Given, ...]
    out: Path
    untie: bool = False
    task: str | None = None
    dtype: str | None = None
    max_shard_size: int | None = None
    device: str = "cpu"
    trust_remote_code: bool = False
    share_untouched: bool = False
    resume: bool = False
    hash: bool = False

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """The adapters, scaled."""
        return tuple(one.scaled for one in self.given)


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A merge that nothing speaks against, as far as headers tell.

    Args:
        fit: how its adapters and its base come together.
        source: what it is made from.
    """

    job: Job
    checkpoint: Checkpoint
    fit: Fit
    source: Inputs

    @property
    def nbytes(self) -> int:
        """What it holds in memory, about: heads, and the outlines of parameters, which stay in their files."""
        adapters = self.fit.adapters
        heads = sum(tensor.nbytes for adapter in adapters for tensor in adapter.replaced.values())
        return heads + sum(len(adapter.plan.steps) for adapter in adapters) * OUTLINE

    def plan(self, directory: Path) -> Planned:
        """What is to be written into `directory`, which is the output or becomes it."""
        job, fit = self.job, self.fit
        planned = plan(
            self.checkpoint,
            fit.adapters,
            directory,
            rename=fit.rename,
            twins=fit.twins,
            dtype=dtype_named(job.dtype),
            max_shard_size=job.max_shard_size,
            device=job.device,
            measure=EVERY,
            metadata=self.source.label(),
        )
        if job.share_untouched:
            return replace(planned, tasks=with_twins(planned.tasks, self.checkpoint))
        return planned


def merge_disk(job: Job, engine: Engine, listen: Listener) -> Report:
    """Do it: `out` is whole, or as it was; see `merge`."""
    prepared = prepare(job)
    words = words_of(prepared)
    if job.resume and is_finished(job.out, words):
        return Report("merge", f"Nothing to do: {job.out} is finished.", {"out": str(job.out)})
    with resumable(job.out, words, resume=job.resume) as unfinished:
        directory = unfinished.directory
        planned = prepared.plan(directory)
        with hashed(list(prepared.source.base) if job.hash else ()):
            files = written(planned.tasks, unfinished.rest(engine), listen)
        done = complete(prepared, planned, directory, files)
    return _report(job, done, files, prepared.fit.blueprint.architecture)


def prepare(job: Job) -> Prepared:
    """Fit adapters and base together, and write nothing.

    Raises:
        AdapterError, FoldError, PlanError, CheckpointError: see `merge`.
    """
    base = locate(job.model)
    check_apart(base, job.out)
    checkpoint = open_checkpoint(base)
    fitted = fit(
        checkpoint, job.adapters, task=job.task, untie=job.untie, trust_remote_code=job.trust_remote_code
    )
    return Prepared(job, checkpoint, fitted, inputs(checkpoint, job.given))


def complete(prepared: Prepared, planned: Planned, directory: Path, files: Iterable[ShardDone]) -> Merged:
    """Put around the weight files, which are there, what makes them a model; last what a loader looks for first."""
    job, base, becomes = prepared.job, prepared.checkpoint.path, prepared.fit.blueprint
    prepared.source.check_unchanged()
    done = finished(directory, planned, files)
    carry(base, directory, but=(CONFIG,))
    options = {word: getattr(job, word) for word in OPTIONS}
    found = provenance(job.model, prepared.source, done.folded, done.added, full=job.hash, options=options)
    write_json(directory / PROVENANCE, found | measured(done.tallies))
    said = merged_config(
        base, becomes.architecture, becomes.classes, dtype=job.dtype, untied=bool(prepared.fit.twins)
    )
    write_json(directory / CONFIG, said)
    return done


def words_of(prepared: Prepared) -> dict[str, Any]:
    """Everything that the bits of the output depend on, so that no two jobs are mixed."""
    job, root = prepared.job, prepared.checkpoint.path
    config = root / CONFIG
    return {
        "base": {name: one.to_dict() for name, one in prepared.source.identities().items()},
        "base's last change": [modified for _, _, modified in prepared.source.base.values()],
        "config": hashlib.sha256(config.read_bytes()).hexdigest() if config.is_file() else None,
        "adapters": list(prepared.source.fingerprints),
        "weights": [one.weight for one in job.given],
        **{word: getattr(job, word) for word in (*OPTIONS, "device", "share_untouched", "hash")},
        "peftsurgery": __version__,
        "torch": torch.__version__,
        "processor": torch.backends.cpu.get_cpu_capability(),
    }


def check_apart(base: Path, out: Path) -> None:
    """Refuse to write over the base.

    Raises:
        PlanError: `out` is the base, or holds it.
    """
    inside = out.resolve()
    if inside == base.resolve() or inside in base.resolve().parents:
        raise PlanError(f"{out} is the model itself; a merge never overwrites its base. Give another `-o`.")


def _report(job: Job, done: Merged, files: Sequence[ShardDone], architecture: str) -> Report:
    facts = {
        "model": str(job.model),
        "adapters": [adapter.name for adapter in job.adapters],
        "architecture": architecture,
        "folded": len(done.folded),
        "added": list(done.added),
        "size": size(done.nbytes),
        **(shared_facts(files) if job.share_untouched else {}),
        "tensors": list(done.folded),
        "vanished": vanished(done.tallies),
        "out": str(job.out),
    }
    headline = f"Merged into {len(done.folded)} of {done.num_tensors} tensors."
    return Report("merge", headline, facts, hint=f"peftsurgery export-onnx {job.out} -o ONNX_DIR")


def shared_facts(files: Iterable[ShardDone]) -> dict[str, Any]:
    """What a report says of files that were linked instead of written: bytes, how, and why others were not."""
    known = list(files)
    return {
        "written": size(sum(file.nbytes for file in known if not file.shared)),
        "shared": size(sum(file.nbytes for file in known if file.shared)),
        "shared by": sorted({file.shared for file in known if file.shared}),
        "not shared because": sorted({file.unshared for file in known if file.unshared}),
    }
