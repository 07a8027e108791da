"""inspect: what a model, a checkpoint, an adapter or a graph is made of, and what words would select."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftsurgery.commands.adapter_files import is_adapter, load_adapter
from peftsurgery.commands.report import Report, size
from peftsurgery.disk import checkpoint as disk
from peftsurgery.disk.locate import locate
from peftsurgery.live import sites as tree
from peftsurgery.planning import Plan
from peftsurgery.select import Layers, Query, Word, select
from peftsurgery.site import Kind, Site

if TYPE_CHECKING:
    from torch import nn

Words = Word | Iterable[Word]


def sites(
    model: nn.Module | str | Path, *, task: str | None = None, trust_remote_code: bool = False
) -> list[Site]:
    """Every site of a live model, a model directory or an `.onnx` file, in its order."""
    if not isinstance(model, str | Path):
        return tree.sites(model)
    if str(model).endswith(".onnx"):
        from peftsurgery.graph import sites as graph_sites
        from peftsurgery.graph import weights

        return graph_sites.sites(weights.load(Path(model)))
    path = locate(model)
    if not (path / "config.json").is_file():
        return disk.sites(disk.open_checkpoint(path))
    return tree.sites(_skeleton(path, task, trust_remote_code))


def inspect(
    model: nn.Module | str | Path,
    *,
    targets: Words | None = None,
    exclude_modules: Words | None = None,
    layers_to_transform: Layers | None = None,
    layers_pattern: str | Sequence[str] | None = None,
    tree: bool = False,
    task: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Report:
    """What `model` is made of: its sites by kind and name, an adapter's method and shapes.

    Args:
        model: a live module, a model directory, an adapter directory, or an `.onnx` file.
        targets: show what these words select (see `plan`), with `exclude_modules`, `layers_to_transform`.
        tree: show every site.

    Raises:
        NoSiteMatched: a word selects nothing.
        CheckpointError, AdapterError: the files are not what they say.
    """
    if isinstance(model, str | Path) and is_adapter(model):
        return _adapter_report(model, tree, allow_pickle)
    offered = sites(model, task=task, trust_remote_code=trust_remote_code)
    facts = _facts(model, offered)
    if targets is None:
        return Report(
            "inspect", f"{_title(model)}: {len(offered)} sites.", facts, _table(offered), _tree(offered, tree)
        )
    query = Query.of(targets, exclude_modules, layers_to_transform, layers_pattern)
    chosen = select(offered, query)
    facts["selected"] = [site.name for site in chosen.sites]
    facts["hits"] = {word: len(names) for word, names in chosen.hits.items()}
    body = str(Plan((), query, hits=facts["hits"])).split("\n", 1)[1] + "\n" + _tree(chosen.sites, True)
    return Report(
        "inspect", f"{_title(model)}: {len(chosen.sites)} of {len(offered)} sites.", facts, body=body
    )


def _adapter_report(path: str | Path, tree: bool, allow_pickle: bool) -> Report:
    adapter = load_adapter(path, allow_pickle=allow_pickle)
    methods = Counter(repr(step.method) for step in adapter.plan.steps)
    facts: dict[str, Any] = {
        "kind": "adapter",
        "method": " + ".join(methods),
        "task": adapter.task_type,
        "base": adapter.base,
        "parameters": adapter.num_parameters,
        "replaces": list(adapter.replaced),
        "sites": [site.name for site in adapter.plan.sites],
    }
    offered = adapter.plan.sites
    return Report(
        "inspect",
        f"{path}: an adapter of {len(offered)} sites.",
        facts,
        _table(offered),
        _tree(offered, tree),
    )


def _facts(model: object, offered: Sequence[Site]) -> dict[str, Any]:
    kinds = Counter(site.kind.value for site in offered)
    facts: dict[str, Any] = {"kind": "model", "kinds": dict(kinds), "sites": [site.name for site in offered]}
    if isinstance(model, str | Path) and not str(model).endswith(".onnx"):
        found = disk.open_checkpoint(locate(model))
        stored = found.tensors.values()
        facts |= {
            "tensors": len(found.tensors),
            "shards": len(found.shards),
            "dtypes": sorted({tensor.dtype for tensor in stored}),
            "size": size(sum(tensor.stop - tensor.start for tensor in stored)),
        }
    return facts


def _table(offered: Sequence[Site]) -> list[tuple[str, ...]]:
    """One row per last name component, kind and shape: what one would write into `targets`."""
    rows = Counter(
        (site.name.rsplit(".", 1)[-1], site.kind.value, site.extent)
        for site in offered
        if site.kind is not Kind.OTHER
    )
    shown = [(*row, str(count)) for row, count in rows.items()]
    return [("name", "kind", "in → out", "sites"), *shown]


def _tree(offered: Sequence[Site], wanted: bool) -> str:
    return "\n".join(f"    {site}" for site in offered) if wanted else ""


def _title(model: object) -> str:
    return str(model) if isinstance(model, str | Path) else type(model).__name__


def _skeleton(path: Path, task: str | None, trust_remote_code: bool) -> nn.Module:
    from peftsurgery.live import pretrained
    from peftsurgery.tasks import task as task_named

    wanted = task_named(task) if task is not None else None
    return pretrained.skeleton(path, task=wanted, trust_remote_code=trust_remote_code)
