"""inject: put a new adapter, or a trained one, on a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftsurgery.adapter import Adapter
from peftsurgery.commands import fusing
from peftsurgery.commands.adapter_files import Adapters, save_adapter
from peftsurgery.commands.report import Report
from peftsurgery.commands.start_text import spelled, start_ids
from peftsurgery.disk.locate import locate
from peftsurgery.errors import PlanError, listing
from peftsurgery.live import anatomy, pretrained, soft, surgery
from peftsurgery.live import sites as tree
from peftsurgery.live.sublayers import output_sites
from peftsurgery.method import Method, OutputMethod, TokenMethod, WeightMethod
from peftsurgery.planning import Plan, by_pattern
from peftsurgery.planning import plan as make_plan
from peftsurgery.reading import AS_PEFT, Reading
from peftsurgery.select import Layers, Query, Word
from peftsurgery.tasks import Task, task_of
from peftsurgery.tasks import task as task_named

if TYPE_CHECKING:
    from torch import nn

Words = Word | Iterable[Word]
WORDS = ("exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern")
BIAS = ("none", "lora_only", "all")


def plan(
    model: nn.Module,
    method: Method,
    targets: Words | None = None,
    *,
    exclude_modules: Words | None = None,
    layers_to_transform: Layers | None = None,
    layers_pattern: str | Sequence[str] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    modules_to_save: Sequence[str] | None = None,
    bias: str = "none",
    task: str | None = None,
) -> Plan:
    """What `inject` with the same words would do; touches nothing. Print it.

    Args:
        targets: module names by suffix (`"query,value"`), glob, `"re:<regex>"`, `"all-linear"`, or a list;
            none for prompts and prefixes, which have one place in every model. Bottlenecks go to
            `"mh_adapter"`, `"output_adapter"` or `"cross_adapter"`, AdapterHub's words for sublayers, or to
            those of them that the words select by name.
        exclude_modules: the same words, for what stays out.
        layers_to_transform: layer numbers, `[0, 1]` or `"0-3"`; `layers_pattern` names the list of layers.
        rank_pattern, alpha_pattern: another `r` or `lora_alpha` for names that match a key, as in PEFT.
        modules_to_save: heads that get a trainable copy; the task's heads do anyway.
        bias: `none`, `lora_only` or `all`: which of the base's biases train too.
        task: the task (`seq-cls`, `SEQ_CLS`, …); by default read off the model's class.

    Raises:
        NoSiteMatched, UnsupportedSite, PlanError: nothing has been touched.
    """
    if bias not in BIAS:
        raise PlanError(f"bias is {bias!r} and is one of {listing(BIAS)}.")
    heads = anatomy.heads(model, modules_to_save, _task(model, task))
    if isinstance(method, TokenMethod):
        choices = (targets, exclude_modules, layers_to_transform, layers_pattern, rank_pattern, alpha_pattern)
        _no_words("Virtual tokens have one place in every model: leave out targets and patterns.", *choices)
        return replace(soft.plan(model, method), modules_to_save=heads, bias=bias)
    if targets is None:
        words = (
            "'output_adapter'" if isinstance(method, OutputMethod) else "['query', 'value'] or 'all-linear'"
        )
        raise PlanError(f"No target was given. Say where, e.g. `targets={words}`.")
    query = Query.of(targets, exclude_modules, layers_to_transform, layers_pattern)
    patterns = {"r": rank_pattern, "lora_alpha": alpha_pattern}
    chosen = _sited(model, method, query, {name: keys for name, keys in patterns.items() if keys}, heads)
    return replace(chosen, modules_to_save=heads, bias=bias)


def _sited(
    model: nn.Module,
    method: Method,
    query: Query,
    patterns: Mapping[str, Mapping[str, float]],
    heads: tuple[str, ...],
) -> Plan:
    is_output = isinstance(method, OutputMethod)
    offered = output_sites(model) if is_output else tree.sites(model)
    outputs = (*anatomy.output_embeddings(model), *heads)
    chosen = make_plan(offered, method, targets=query, reserved=heads, outputs=outputs)
    if not patterns:
        return chosen
    refine = by_pattern(chosen.sites, **patterns)
    return make_plan(offered, method, targets=query, reserved=heads, outputs=outputs, refine=refine)


def inject(
    model: nn.Module | str | Path,
    method: Method | Adapter,
    targets: Words | None = None,
    *,
    exclude_modules: Words | None = None,
    layers_to_transform: Layers | None = None,
    layers_pattern: str | Sequence[str] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    modules_to_save: Sequence[str] | None = None,
    bias: str = "none",
    task: str | None = None,
    name: str | None = None,
    seed: int | None = None,
    adapters: Adapters = (),
    trainable: bool = True,
    reading: Reading = AS_PEFT,
    out: str | Path | None = None,
    dry_run: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> nn.Module | Report:
    """Put a new adapter, or a trained one, on a live model; or write a fresh adapter for a model directory.

    The words are those of `plan`. A live model comes back as the one to call from now on, changed as a
    whole or not at all. For a directory, `out` receives a fresh adapter in PEFT's format.

    Args:
        method: the method (`LoRA(r=8)`), or an adapter from `load_adapter` or `remove`.
        name: what the adapter is called; its own name, or `default`.
        adapters: the trained bottleneck adapters that an `AdapterFusion()` fuses, at their own places and
            without their heads; `allow_pickle` reads a `.bin` among them.
        trainable: whether the adapter's parameters require gradients; `seed` makes fresh ones reproducible.
        reading: how a live model reads virtual tokens, where it is not as in PEFT.
        dry_run: plan and report only.

    Raises:
        PlanError, AdapterError, FoldError: nothing has been touched.
    """
    words = (exclude_modules, layers_to_transform, layers_pattern, rank_pattern, alpha_pattern)
    if isinstance(method, Adapter):
        _no_words("A trained adapter knows its sites: leave out all words.", targets, modules_to_save, *words)
        own = replace(method, name=name or method.name)
        return surgery.inject(_live(model), own, trainable=trainable, reading=reading)
    tree_of = _skeleton(model, task, trust_remote_code) if isinstance(model, str | Path) else model
    method = spelled(tree_of, method)
    members = fusing.members(tree_of, method, adapters, allow_pickle)
    said = dict(zip(WORDS, words, strict=True)) | {"modules_to_save": modules_to_save}
    chosen = _chosen(tree_of, method, members, targets, said | {"bias": bias, "task": task})
    if dry_run:
        return _planned(chosen)
    label = name or "default"
    if isinstance(model, str | Path):
        return _written(model, tree_of, chosen, members, label, seed, task, out, trust_remote_code)
    fresh = _fresh(tree_of, chosen, members, label, seed, task)
    return surgery.graft(tree_of, fresh, trainable=trainable, reading=reading)


def _fresh(
    model: nn.Module,
    chosen: Plan,
    members: list[Adapter],
    name: str,
    seed: int | None,
    word: str | None,
    real: bool = False,
) -> Adapter:
    """A new adapter for the plan; a fusion's members bring their parameters."""
    ids = start_ids(model, chosen.steps[0].method)
    fresh = surgery.fresh(model, chosen, name, seed, _peft_task(model, word), ids=ids, real=real)
    return fusing.filled(fresh, members)


def _chosen(
    model: nn.Module, method: Method, members: list[Adapter], targets: Words | None, said: dict[str, Any]
) -> Plan:
    """The plan of the words; that of a fusion goes where its members are."""
    if not members:
        return plan(model, method, targets, **said)
    _no_words("A fusion goes where its adapters are: leave out targets.", targets)
    steps = fusing.steps(method, members)
    chosen = plan(model, next(iter(steps.values())).method, list(steps), **said)
    queries = [member.plan.query for member in members]
    query = queries[0] if all(one == queries[0] for one in queries) else chosen.query
    return replace(chosen, steps=tuple(steps[site.name] for site in chosen.sites), query=query)


def _written(
    model: str | Path,
    tree_of: nn.Module,
    chosen: Plan,
    members: list[Adapter],
    name: str,
    seed: int | None,
    word: str | None,
    out: str | Path | None,
    trust_remote_code: bool,
) -> Report:
    if out is None:
        raise PlanError(
            "A fresh adapter for a model directory needs a place: give `out=` (`-o DIR`), or `dry_run`."
        )
    method = chosen.steps[0].method
    needs_rows = isinstance(method, TokenMethod) and method.needs_vocabulary
    if chosen.modules_to_save or chosen.bias != "none" or needs_rows:
        # heads, biases and prompts that start from words start from the base's own values
        named = _peft_task(tree_of, word)
        tree_of = pretrained.load(
            locate(model),
            task=task_named(named) if named else None,
            fresh=chosen.modules_to_save,
            trust_remote_code=trust_remote_code,
        )
    adapter = replace(_fresh(tree_of, chosen, members, name, seed, word, real=True), base=str(model))
    save_adapter(adapter, out)
    facts = {"sites": len(chosen.steps), "parameters": adapter.num_parameters, "out": str(out)}
    hint = f"{_first(method)}`peftsurgery {_then(method, model, out)}`"
    return Report("inject", f"Wrote a fresh {chosen.steps[0].method.name} adapter.", facts, hint=hint)


def _first(method: Method) -> str:
    if isinstance(method, TokenMethod) and not method.trainable:
        return "there is nothing to train: "
    return f"train it with {'PEFT' if method.peft_type else 'AdapterHub'} or peftsurgery, then "


def _then(method: Method, model: str | Path, out: str | Path) -> str:
    if isinstance(method, WeightMethod):
        return f"merge {model} {out} -o merged"
    if isinstance(method, TokenMethod) and method.trainable:
        return f"bake {out} -o baked --base {model}"
    return f"export-onnx {model} --adapter {out} -o onnx"


def _planned(chosen: Plan) -> Report:
    sites = [site.name for site in chosen.sites]
    facts = {
        "dry_run": True,
        "sites": sites,
        "hits": dict(chosen.hits),
        "modules_to_save": list(chosen.modules_to_save),
    }
    return Report("inject", "Dry run: nothing was changed.", facts, body=str(chosen))


def _live(model: nn.Module | str | Path) -> nn.Module:
    if isinstance(model, str | Path):
        raise PlanError(
            "A trained adapter goes onto a live model. For a directory, merge it instead: "
            "`peftsurgery merge MODEL ADAPTER -o OUT`."
        )
    return model


def _no_words(message: str, *words: object) -> None:
    if any(word is not None for word in words):
        raise PlanError(message)


def _task(model: nn.Module, word: str | None) -> Task | None:
    return task_named(word) if word is not None else task_of(type(model).__name__)


def _peft_task(model: nn.Module, word: str | None) -> str | None:
    known = _task(model, word)
    return known.peft if known is not None else None


def _skeleton(model: str | Path, word: str | None, trust_remote_code: bool) -> nn.Module:
    wanted = task_named(word) if word is not None else None
    return pretrained.skeleton(locate(model), task=wanted, trust_remote_code=trust_remote_code)
