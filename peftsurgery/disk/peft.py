"""PEFT's adapter directory, both ways: `adapter_config.json` beside `adapter_model.safetensors`.

Of a soft prompt that has an encoder, the encoder lies in a third file, which PEFT passes over.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from peftsurgery.adapter import Adapter, check
from peftsurgery.disk import peft_soft
from peftsurgery.disk.adapter_files import check_values, json_object, put, safetensors, tensors
from peftsurgery.disk.durable import write_json
from peftsurgery.disk.peft_config import method_of, parse
from peftsurgery.disk.peft_keys import heads, keyed, understood
from peftsurgery.disk.peft_render import render
from peftsurgery.errors import AdapterError, PlanError
from peftsurgery.method import Method, TokenMethod

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
ENCODER = "encoder.safetensors"
HOLDS = f"An adapter is a directory that holds {CONFIG} and {TENSORS}."


def read(
    path: Path, methods: Mapping[str, type[Method]], *, name: str = "default", allow_pickle: bool = False
) -> Adapter:
    """The adapter in a directory that PEFT saved, every tensor accounted for; sites in natural order.

    The layout and kind of a site are what the files let one know; `rebased` takes them from the base.

    Args:
        methods: the methods that may be found, by any key.
        name: what the adapter will be called.
        allow_pickle: read `adapter_model.bin` where there is no safetensors file, with `weights_only=True`.

    Raises:
        UnknownMethod: a method, or an option of one, that is not implemented.
        MismatchedTensors: missing, unexpected or misshapen tensors.
        NonFiniteWeight: a NaN or an infinity.
        UntrustedPickle: only a pickle is there, and it was not asked for.
        TruncatedShard: the tensor file is shorter, or stranger, than its header says.
        AdapterError: anything else that keeps the directory from being understood.
    """
    try:
        raw = _json(path)
        kind = method_of(raw, methods)
        if issubclass(kind, TokenMethod):
            return peft_soft.understood(
                raw, kind, tensors(path, TENSORS, PICKLE, allow_pickle), _encoder(path), name
            )
        config = parse(raw, methods)
        return check(understood(config, tensors(path, TENSORS, PICKLE, allow_pickle), name))
    except (PlanError, OverflowError) as error:
        raise AdapterError(f"{path / CONFIG} says what no adapter means: {error}") from error
    except OSError as error:
        raise AdapterError(
            f"{error.filename or path} cannot be read: {error.strerror}. Check the path."
        ) from error


def write(adapter: Adapter, directory: Path) -> None:
    """Write the adapter's files into a directory that `staged` gave.

    What PEFT cannot say in the words of the plan's query is said with the full names of the sites.

    Raises:
        AdapterError: it cannot be said in PEFT's format, or its tensors have no values.
        MismatchedTensors, NonFiniteWeight: it is not whole.
        CheckpointError: a file cannot be written.
    """
    check(adapter)
    check_values(adapter)
    stranger = next((s.method.name for s in adapter.plan.steps if s.method.peft_type is None), None)
    if stranger is not None:
        raise AdapterError(
            f"PEFT has no {stranger} adapters, and so no format for them. Take AdapterHub's: `format='adapterhub'`."
        )
    if any(isinstance(step.method, TokenMethod) for step in adapter.plan.steps):
        said = peft_soft.files(adapter)
    else:
        said = peft_soft.Files(render(adapter, heads(adapter)), keyed(adapter), [])
    put(directory / TENSORS, said.tensors)
    if said.encoder:
        put(directory / ENCODER, said.encoder)
    write_json(directory / CONFIG, dict(sorted(said.config.items())))


def _json(path: Path) -> Mapping[str, object]:
    if not path.is_dir():
        raise AdapterError(f"{path} is no directory. {HOLDS}")
    if not (path / CONFIG).exists():
        model = " (it holds a model)" if (path / "config.json").exists() else ""
        raise AdapterError(f"{path} holds no {CONFIG}{model}. {HOLDS}")
    return json_object(path / CONFIG)


def _encoder(path: Path) -> Mapping[str, Tensor] | None:
    return safetensors(path / ENCODER) if (path / ENCODER).exists() else None
