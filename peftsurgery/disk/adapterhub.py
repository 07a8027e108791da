"""AdapterHub's directories, both ways: adapters, fusions, set-ups, and the heads in them.

Written against adapters 1.3.0 (https://docs.adapterhub.ml). An adapter is `adapter_config.json` beside
`adapter.safetensors`; a fusion adds a directory with `adapter_fusion_config.json`, and a set-up holds all of them
below `adapter_setup.json`. Its library reads them with `use_safetensors=True`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from peftsurgery.adapter import Adapter, check
from peftsurgery.disk import (
    adapterhub_bottleneck,
    adapterhub_fusion,
    adapterhub_heads,
    adapterhub_lora,
    adapterhub_prefix,
)
from peftsurgery.disk.adapter_files import check_values, json_object, put, tensors
from peftsurgery.disk.adapterhub_config import VERSION, Said, Written, full, said
from peftsurgery.disk.adapterhub_fusion import FUSION, SETUP
from peftsurgery.disk.durable import write_json
from peftsurgery.errors import AdapterError, PlanError, UnknownMethod, listing
from peftsurgery.method import Method
from peftsurgery.site import Kind

CONFIG, SAFE, PICKLE = "adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin"
Methods = Mapping[str, type[Method]]
Reader = Callable[[Said, Mapping[str, Tensor], Methods], Adapter]

READERS: Mapping[str | None, Reader] = {
    None: adapterhub_bottleneck.understood,
    "lora": adapterhub_lora.understood,
    "prefix_tuning": adapterhub_prefix.understood,
}
"""By AdapterHub's word for the architecture of an adapter; bottlenecks have none."""
WRITERS: Mapping[str, Callable[[Adapter], Written]] = {
    "bottleneck": adapterhub_bottleneck.written,
    "lora": adapterhub_lora.written,
    "prefix-tuning": adapterhub_prefix.written,
}
WHY = {
    "prompt-tuning": "AdapterHub puts a prompt behind the embeddings' positions and norm, and this one is in front "
    "of them; no table gives both the same",
    "p-tuning": "AdapterHub has no p-tuning",
}


def is_here(path: Path) -> bool:
    """Whether a directory is one of AdapterHub's: an adapter, a fusion or a set-up."""
    if any((path / name).is_file() for name in (SETUP, FUSION)):
        return True
    if not (path / CONFIG).is_file():
        return False
    raw = json_object(path / CONFIG)
    return "peft_type" not in raw and "config" in raw


def folders(path: Path) -> list[Path]:
    """The directories whose files are an adapter's that `read` reads: its own, those of a fusion and its members."""
    if (path / SETUP).is_file():
        names = adapterhub_fusion.setup_members(json_object(path / SETUP))
        own = [path, path / ",".join(names)]
    elif (path / FUSION).is_file():
        names, own = adapterhub_fusion.member_names(json_object(path / FUSION)), [path]
    else:
        return [path]
    return list(dict.fromkeys([*own, *(adapterhub_fusion.member_folder(path, name) for name in names)]))


def read(path: Path, methods: Methods, *, name: str | None = None, allow_pickle: bool = False) -> Adapter:
    """The adapter in a directory that AdapterHub's library saved, every tensor accounted for.

    Args:
        methods: the methods that may be found, by name.
        name: what the adapter will be called; what its files call it by default.
        allow_pickle: read a `.bin` where there is no safetensors file, with `weights_only=True`.

    Raises:
        UnknownMethod: a method, or an option of one, that is not implemented.
        MismatchedTensors: missing, unexpected or misshapen tensors.
        NonFiniteWeight: a NaN or an infinity.
        UntrustedPickle: only a pickle is there, and it was not asked for.
        TruncatedShard: the tensor file is shorter, or stranger, than its header says.
        AdapterError: anything else that keeps the directory from being understood.
    """
    try:
        found = _read(path, methods, allow_pickle)
    except (PlanError, OverflowError) as error:
        raise AdapterError(f"{path} says what no adapter means: {error}") from error
    except OSError as error:
        raise AdapterError(
            f"{error.filename or path} cannot be read: {error.strerror}. Check the path."
        ) from error
    return check(replace(found, name=name or found.name))


def write(adapter: Adapter, directory: Path) -> None:
    """Write the adapter's files into a directory that `staged` gave; a fusion as a set-up.

    Raises:
        AdapterError: it cannot be said in AdapterHub's format, or its tensors have no values.
        MismatchedTensors, NonFiniteWeight: it is not whole.
        CheckpointError: a file cannot be written.
    """
    check(adapter)
    check_values(adapter)
    if adapter.plan.bias != "none":
        raise AdapterError(
            f"bias is {adapter.plan.bias!r}, and AdapterHub's format holds no biases of the base. Keep PEFT's format."
        )
    names = sorted({step.method.name for step in adapter.plan.steps})
    if names == ["fusion"]:
        _write_setup(adapter, directory)
    elif len(names) == 1 and names[0] in WRITERS:
        _write_one(adapter, directory)
    else:
        why = WHY.get(names[0], "its format holds one method") if names else "the adapter stands at no site"
        raise AdapterError(
            f"AdapterHub's format cannot say {listing(names) or 'it'}: {why}. Keep PEFT's format."
        )
    _write_head(adapter, directory)


def _read(path: Path, methods: Methods, allow_pickle: bool) -> Adapter:
    if (path / SETUP).is_file():
        return _read_setup(path, methods, allow_pickle)
    if (path / FUSION).is_file():
        return _read_fusion(path, path, methods, allow_pickle)
    return _with_head(_read_one(path, methods, allow_pickle), path, allow_pickle)


def _read_one(path: Path, methods: Methods, allow_pickle: bool) -> Adapter:
    found = said(json_object(path / CONFIG))
    word = found.config.get("architecture")
    if word not in READERS:
        raise UnknownMethod(
            f"`architecture` is {word!r}, and of AdapterHub's peftsurgery reads bottlenecks, "
            f"{listing([known for known in READERS if known])}. Use AdapterHub's library for this adapter."
        )
    return READERS[word](found, tensors(path, SAFE, PICKLE, allow_pickle), methods)


def _read_fusion(path: Path, members: Path, methods: Methods, allow_pickle: bool) -> Adapter:
    raw = json_object(path / FUSION)
    names = adapterhub_fusion.member_names(raw)
    own = [_read_one(adapterhub_fusion.member_folder(members, name), methods, allow_pickle) for name in names]
    held = tensors(path, adapterhub_fusion.SAFE, adapterhub_fusion.PICKLE, allow_pickle)
    fused = adapterhub_fusion.understood(said(raw), held, own, methods)
    return _with_head(replace(fused, name="_".join(names)), path, allow_pickle)


def _read_setup(path: Path, methods: Methods, allow_pickle: bool) -> Adapter:
    raw = json_object(path / SETUP)
    names = adapterhub_fusion.setup_members(raw)
    folder = path / ",".join(names)
    if (folder / FUSION).is_file():
        found = _read_fusion(folder, path, methods, allow_pickle)
    elif len(names) == 1:
        found = _read(folder, methods, allow_pickle)
    else:
        raise AdapterError(
            f"{path} fuses {listing(names)} and holds no {folder.name}/{FUSION}. Save it again."
        )
    head = raw.get("head_setup")
    return _with_head(found, path / head if isinstance(head, str) else path, allow_pickle)


def _with_head(adapter: Adapter, path: Path, allow_pickle: bool) -> Adapter:
    if not (path / adapterhub_heads.HEAD).is_file():
        return adapter
    held = tensors(path, adapterhub_heads.SAFE, adapterhub_heads.PICKLE, allow_pickle)
    head = adapterhub_heads.understood(json_object(path / adapterhub_heads.HEAD), held)
    return replace(adapter, replaced=head.tensors, task_type=head.task_type)


def _write_one(adapter: Adapter, directory: Path) -> None:
    done = WRITERS[adapter.plan.steps[0].method.name](adapter)
    put(directory / SAFE, done.tensors)
    more = {"config": done.config, **done.more}
    write_json(directory / CONFIG, full(more, adapter, adapter.name, _width(adapter)))


def _write_setup(adapter: Adapter, directory: Path) -> None:
    config, held, members = adapterhub_fusion.written(adapter)
    name = ",".join(member.name for member in members)
    for member in members:
        (directory / member.name).mkdir()
        _write_one(member, directory / member.name)
    (directory / name).mkdir()
    put(directory / name / adapterhub_fusion.SAFE, held)
    write_json(directory / name / FUSION, full(config, adapter, name, _width(adapter)))
    head = True if adapter.replaced else None
    said_setup = adapterhub_fusion.setup([member.name for member in members])
    write_json(directory / SETUP, {"adapter_setup": said_setup, "head_setup": head, "version": VERSION})


def _write_head(adapter: Adapter, directory: Path) -> None:
    done = adapterhub_heads.written(adapter)
    if done is None:
        return
    config, held = done
    put(directory / adapterhub_heads.SAFE, held)
    words = full(config, adapter, adapter.name, _width(adapter)) | {"name": None}
    write_json(directory / adapterhub_heads.HEAD, words)


def _width(adapter: Adapter) -> int | None:
    site = adapter.plan.sites[0]
    if site.kind is Kind.OUTPUT:
        return site.shape[0]
    return site.shape[0] * site.shape[1] if site.kind is Kind.ATTENTION else None
