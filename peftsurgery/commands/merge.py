"""merge: fold adapters into a model, wherever it lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from peftsurgery.adapter import Adapter, rebased
from peftsurgery.commands.adapter_files import Adapters, Given, given
from peftsurgery.commands.adapter_list import listed
from peftsurgery.commands.companions import carry
from peftsurgery.commands.fleet import merge_fleet
from peftsurgery.commands.fleet_pass import Fleet
from peftsurgery.commands.in_place import merge_in_place
from peftsurgery.commands.merge_disk import Job, check_apart, merge_disk
from peftsurgery.commands.report import Report
from peftsurgery.disk.durable import staged
from peftsurgery.disk.engines import engine as engine_named
from peftsurgery.errors import PlanError
from peftsurgery.events import Listener, ignore
from peftsurgery.fold import touches
from peftsurgery.sizes import nbytes_named

if TYPE_CHECKING:
    from torch import nn

    from peftsurgery.live.merge import Undo


def merge(
    model: nn.Module | str | Path,
    adapters: Adapters = (),
    *,
    adapters_from: str | Path | Mapping[str, str | Path] | None = None,
    out: str | Path | None = None,
    weight: Sequence[float] = (),
    in_place: bool = False,
    undo: str | Path | None = None,
    untie: bool = False,
    task: str | None = None,
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    device: str = "cpu",
    share_untouched: bool = False,
    engine: str = "local",
    resume: bool = False,
    hash: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    listen: Listener = ignore,
) -> Undo | Report:
    """Fold adapters into W0: of a live model, of a safetensors checkpoint, or of an ONNX file.

    Folding is done in float32 and rounded once. A checkpoint goes block by block into a new directory that
    `from_pretrained` loads: config, labels and tokenizer travel along. A live model is changed in
    place, and what comes back, called, undoes it.

    Args:
        model: a live module, a model directory, a hub id in the local cache, or an `.onnx` file.
        adapters: one or several: directories, or `Adapter`s.
        adapters_from: many adapters that are merged each into a model of its own, `out/NAME`: a text file with a line
            `path` or `name=path` for each, a directory of adapters, or names → directories.
        out: the directory to write (not for a live model).
        in_place: patch the checkpoint's own files instead of writing new ones, and keep what they held in `undo`;
            after a crash the same call, or `unmerge`, makes the checkpoint whole.
        undo: the file to write for `unmerge`.
        weight: a factor for each adapter's effect; 1 by default.
        untie: write a copy of a tied weight that the adapter changes for one of its names only.
        task, dtype: those of the merged model, where they are not the adapter's and the base's.
        max_shard_size: bytes of tensors in a file, as `5GB` or a number; the base's own files by default.
        device: where folding is computed, e.g. `cuda`.
        share_untouched: do not write weights again that no adapter touches, where the file system can share them:
            files of the base; of a list of adapters every tensor that some of them leave alone.
        engine: who writes a checkpoint's files: `local`, this process, or `ray`, the nodes of a cluster.
        resume: go on with what an interrupted merge of the same into `out` left; the result has the same bits.
        hash: have `peftsurgery.json` say the SHA-256 of every byte of the base and the adapters.

    Raises:
        AdapterError, FoldError, PlanError, CheckpointError: inputs and output are as they were.
        FleetError: some adapters of a list could not be merged, and the others were.
    """
    reshaped = untie or dtype is not None or max_shard_size is not None
    _check_in_place(model, in_place, undo, out is not None or reshaped)
    _check_adapters(adapters, weight, adapters_from)
    anew = {"--adapters-from": adapters_from is not None, "--share-untouched": share_untouched}
    _check_anew(model, in_place, {**anew, "--resume": resume, f"--engine {engine}": engine != "local"})
    load = partial(_given, weight=weight, allow_pickle=allow_pickle)
    taken = load(adapters) if adapters_from is None else ()
    if not isinstance(model, str | Path):
        return _merge_live(model, _scaled(taken), untie, listen)
    if in_place:
        return merge_in_place(model, taken, undo, task, hash, trust_remote_code, listen)
    if str(model).endswith(".onnx"):
        return _merge_graph(Path(model), _scaled(taken), _place(model, out), listen)
    shape = untie, task, dtype, nbytes_named(max_shard_size), device
    job = Job(model, taken, _place(model, out), *shape, trust_remote_code, share_untouched, resume, hash)
    fleet = None if adapters_from is None else Fleet(listed(adapters_from), job, load)
    with engine_named(engine) as writers:
        return merge_disk(job, writers, listen) if fleet is None else merge_fleet(fleet, writers, listen)


def _given(adapters: Adapters, *, weight: Sequence[float], allow_pickle: bool) -> tuple[Given, ...]:
    """The adapters; what does not fold is refused before a model is looked at."""
    found = tuple(given(adapters, weight, allow_pickle=allow_pickle))
    touches(*(one.scaled for one in found))
    return found


def _scaled(taken: Sequence[Given]) -> tuple[Adapter, ...]:
    return tuple(one.scaled for one in taken)


def _check_in_place(model: object, in_place: bool, undo: object, elsewhere: bool) -> None:
    if not in_place and undo is None:
        return
    if not in_place:
        raise PlanError("An undo file belongs to a merge in place. Add `--in-place`; nothing was changed.")
    if elsewhere:
        raise PlanError(
            "A merge in place changes values and nothing else: no `-o`, `--untie`, `--dtype` or "
            "`--max-shard-size`. Merge into a new directory with `-o OUT`; nothing was changed."
        )
    if not isinstance(model, str | Path):
        raise PlanError("A live model is changed in place anyway: call `merge(model, adapter)`.")


def _check_adapters(adapters: Adapters, weight: Sequence[float], adapters_from: object) -> None:
    if (adapters_from is not None) == (isinstance(adapters, Adapter | str | Path) or bool(adapters)):
        raise PlanError(
            "A merge takes adapters, or a list of them with `--adapters-from`: one of the two. Nothing was changed."
        )
    if adapters_from is not None and len(weight) > 1:
        raise PlanError("A list of adapters takes one `--weight`, which is that of all. Nothing was changed.")


def _check_anew(model: object, in_place: bool, words: Mapping[str, bool]) -> None:
    """Refuse words that mean something for a checkpoint that is written into a new directory alone."""
    if not in_place and isinstance(model, str | Path) and not str(model).endswith(".onnx"):
        return
    for word in (word for word, said in words.items() if said):
        raise PlanError(
            f"`{word}` is for a checkpoint that is written into a new directory. Give the model's directory, "
            "and that one as `-o OUT`; nothing was changed."
        )


def _merge_live(model: nn.Module, adapters: Sequence[Adapter], untie: bool, listen: Listener) -> Undo:
    from peftsurgery.live.merge import merge as merge_live

    return merge_live(model, *adapters, untie=untie, listen=listen)


def _place(model: str | Path, out: str | Path | None) -> Path:
    if out is None:
        raise PlanError(
            f"The merged model needs a place of its own: `peftsurgery merge {model} ADAPTER -o OUT`."
        )
    return Path(out).expanduser()


def _merge_graph(model: Path, adapters: Sequence[Adapter], out: Path, listen: Listener) -> Report:
    import peftsurgery.graph.merge as graph_merge
    import peftsurgery.graph.sites as graph_sites
    from peftsurgery.graph import reference, weights

    graph = weights.load(model)
    inline = not reference.files(graph)
    names = graph.graph.initializers
    fitted = [rebased(adapter, graph_sites.sites(graph), names)[0] for adapter in adapters]
    check_apart(model.parent, out)
    with staged(out) as directory:
        graph_merge.merge(graph, fitted, listen=listen)
        weights.save(graph, directory, name=model.name, inline=inline)
        carry(model.parent, directory)
    facts = {
        "model": str(model),
        "adapters": [a.name for a in adapters],
        "folded": sum(len(a.plan.steps) for a in fitted),
        "out": str(out),
    }
    return Report(
        "merge", f"Merged into {model.name}.", facts, hint=f"peftsurgery verify {out} --against MODEL"
    )
