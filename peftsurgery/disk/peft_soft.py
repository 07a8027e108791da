"""PEFT's files of soft prompts: the table `prompt_embeddings`, heads, and the encoder that PEFT loses.

PEFT stores what an encoder gives and not the encoder, so its training cannot go on. `encoder.safetensors`
holds the encoder under the names of PEFT's own modules; PEFT passes over it. Without it, what is read is the
baked method: the tokens are the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields

from torch import Tensor

from peftsurgery.adapter import Adapter, bake, check
from peftsurgery.disk.peft_config import arguments, names, refuse_options, text
from peftsurgery.disk.peft_keys import check_numbers, heads, is_known, plain_name, replaced
from peftsurgery.disk.peft_sites import natural
from peftsurgery.errors import AdapterError, MismatchedTensors, listing
from peftsurgery.method import TABLE, Params, TokenMethod
from peftsurgery.planning import Plan, Step
from peftsurgery.site import Kind, Layout, Site

PREFIX = "base_model."
SIZES = ("token_dim", "num_layers", "num_attention_heads")
KNOWN = {*SIZES, "peft_type", "task_type", "base_model_name_or_path", "modules_to_save"}
HARMLESS = {"num_transformer_submodules", "tokenizer_kwargs"}
"""Keys that say nothing which the table does not; the first follows from the task where no field says it."""
IDLE = {"prompt_tuning_init_text": ("prompt_tuning_init", "TEXT")}
"""Keys that mean something only where another has a certain value."""
SEQ2SEQ = "SEQ_2_SEQ_LM"
SLACK = 1e-4
"""How far an encoder may be from its table, relative to its largest value: one sum on two machines."""

Tensors = list[tuple[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Files:
    """What the three files hold; an encoder without tensors needs no file."""

    config: Mapping[str, object]
    tensors: Tensors
    encoder: Tensors


def understood(
    raw: Mapping[str, object],
    kind: type[TokenMethod],
    tensors: Mapping[str, Tensor],
    encoder: Params | None,
    name: str,
) -> Adapter:
    """The adapter that a configuration, its tensors and an encoder, where one lies beside them, make.

    The files do not name the places where tokens enter; `rebased` finds them in the base.

    Raises:
        UnknownMethod: an option that is not implemented.
        MismatchedTensors: tensors are missing, unexpected, or of another encoder.
        NonFiniteWeight: a NaN or an infinity.
        PlanError, AdapterError: a value of the wrong type or out of its range.
    """
    refuse_options(raw, KNOWN | HARMLESS | {field.name for field in fields(kind)})
    check_numbers({**tensors, **(encoder or {})})
    saved = tuple(dict.fromkeys(names(raw, "modules_to_save")))
    table, whole = _divided(tensors, saved)
    method = kind(**arguments(_in_force(raw), kind))
    sites = _attention(raw, table) if Kind.ATTENTION in kind.kinds else _words(raw, table)
    stands = method if encoder is not None else method.baked()
    adapter = Adapter(
        Plan(tuple(Step(site, stands) for site in sites), modules_to_save=saved),
        {site.name: {} for site in sites},
        name,
        shared={TABLE: table} if encoder is None else encoder,
        replaced=replaced(whole, name, PREFIX),
        task_type=text(raw, "task_type"),
        base=text(raw, "base_model_name_or_path"),
    )
    return check(adapter) if encoder is None else _agreeing(adapter, method, table)


def files(adapter: Adapter) -> Files:
    """What is written for an adapter of tokens. A method that PEFT has no word for is written baked.

    Raises:
        AdapterError: PEFT's format cannot say it.
    """
    method = adapter.plan.steps[0].method
    if not isinstance(method, TokenMethod) or any(s.method != method for s in adapter.plan.steps):
        raise AdapterError(
            "The adapter has virtual tokens and other methods beside them, and PEFT's format holds one. "
            "Save them as two adapters."
        )
    if adapter.plan.bias != "none":
        raise AdapterError(
            f"bias is {adapter.plan.bias!r}, and beside virtual tokens PEFT's format holds whole heads only. "
            "Name the modules in `modules_to_save` instead."
        )
    if not adapter.reading.position_shift:
        raise AdapterError(
            "The prefix was trained with words that are numbered from 0, as in AdapterHub, and PEFT numbers them from "
            "n on. `peftsurgery convert ADAPTER --to peft --base MODEL -o OUT` writes the positions that make up for "
            "it beside the prefix."
        )
    baked = bake(adapter)
    if not method.trainable:
        return files(baked)
    whole = [(f"{PREFIX}{name}", tensor) for name, tensor in adapter.replaced.items()]
    encoder = [] if baked is adapter else list(adapter.shared.items())
    return Files(
        _config(adapter, method), _ordered([*whole, (TABLE, baked.shared[TABLE])]), _ordered(encoder)
    )


def _ordered(tensors: Tensors) -> Tensors:
    """In safetensors' order: wide dtypes first, then by key."""
    return sorted(tensors, key=lambda pair: (-pair[1].dtype.itemsize, pair[0]))


def _config(adapter: Adapter, method: TokenMethod) -> dict[str, object]:
    said = {
        "num_transformer_submodules": 2 if adapter.task_type == SEQ2SEQ else 1,
        **asdict(method),
        **_sizes(adapter.plan.sites),
        "peft_type": method.peft_type,
        "task_type": adapter.task_type,
        "base_model_name_or_path": adapter.base,
        "modules_to_save": list(heads(adapter)) or None,
        "inference_mode": True,
    }
    if method.start_text is not None and not said.get("tokenizer_name_or_path"):
        # PEFT asks for one wherever a text is named, and reads it only for a fresh table.
        said["tokenizer_name_or_path"] = adapter.base or "unknown"
    return said


def _sizes(sites: Sequence[Site]) -> dict[str, int]:
    if sites[0].kind is Kind.ATTENTION:
        count, width = sites[0].shape
        return dict(zip(SIZES, (count * width, len(sites), count), strict=True))
    # PEFT wants all three, and of some models cannot tell them; for embeddings it uses the first alone.
    return dict(zip(SIZES, (sites[0].shape[1], 1, 1), strict=True))


def _in_force(raw: Mapping[str, object]) -> dict[str, object]:
    """The configuration without what other keys switch off."""
    return {
        key: value for key, value in raw.items() if key not in IDLE or raw.get(IDLE[key][0]) == IDLE[key][1]
    }


def _divided(
    tensors: Mapping[str, Tensor], modules_to_save: Collection[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The table, and the tensors of heads by key."""
    whole = {
        key: tensor
        for key, tensor in tensors.items()
        if key.startswith(PREFIX) and is_known(plain_name(key, prefix=PREFIX), modules_to_save, "none", ())
    }
    strange = sorted(tensors.keys() - whole.keys() - {TABLE}, key=natural)
    if TABLE not in tensors or strange:
        lacks = "" if TABLE in tensors else f"lacks {TABLE!r}"
        holds = f"holds {listing(strange)}, which its configuration does not announce" if strange else ""
        raise MismatchedTensors(
            f"The adapter's file {' and '.join(filter(None, (lacks, holds)))}. Save or download the adapter "
            "again; modules that were trained whole belong in `modules_to_save`.",
            missing=[] if TABLE in tensors else [TABLE],
            unexpected=strange,
        )
    if tensors[TABLE].ndim != 2:
        raise _misshapen(tensors[TABLE], "a table of two dimensions")
    return tensors[TABLE], whole


def _words(raw: Mapping[str, object], table: Tensor) -> tuple[Site, ...]:
    """The one place of embeddings; of the vocabulary the files say nothing."""
    width = table.shape[1] if raw.get("token_dim") is None else _size(raw, "token_dim")
    return (Site("word_embeddings", Kind.TOKENS, (1, width), Layout.IN_OUT),)


def _attention(raw: Mapping[str, object], table: Tensor) -> tuple[Site, ...]:
    """The attention layers by number."""
    width, layers, count = (_size(raw, key) for key in SIZES)
    if width % count:
        raise AdapterError(
            f"`token_dim` is {width}, which {count} heads (`num_attention_heads`) cannot share evenly. "
            "The configuration is damaged: save or download the adapter again."
        )
    if table.shape[1] != 2 * layers * width:
        raise _misshapen(table, f"keys and values of {width} numbers for {layers} layers")
    shape = (count, width // count)
    return tuple(Site(f"layers.{layer}.attention", Kind.ATTENTION, shape) for layer in range(layers))


def _size(raw: Mapping[str, object], key: str) -> int:
    value = raw.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise AdapterError(f"`{key}` is {repr(value)[:60]}. It is a whole number of at least 1.")
    return value


def _misshapen(table: Tensor, announced: str) -> MismatchedTensors:
    return MismatchedTensors(
        f"{TABLE!r} has shape {tuple(table.shape)}, and the configuration announces {announced}. "
        "The two files are not of one adapter.",
        unexpected=[TABLE],
    )


def _agreeing(adapter: Adapter, method: TokenMethod, table: Tensor) -> Adapter:
    """The adapter with its encoder, when that gives the stored table.

    Raises:
        MismatchedTensors: it does not.
    """
    if method.baked() is method:
        raise MismatchedTensors(
            f"An encoder lies beside a {method.peft_type} adapter that has none. Take the file away, or the "
            "configuration it belongs to.",
            unexpected=sorted(adapter.shared),
        )
    given = bake(check(adapter)).shared[TABLE].float()
    stored = table.float()
    if given.shape == stored.shape and (given - stored).abs().max() <= SLACK * stored.abs().max():
        return adapter
    raise MismatchedTensors(
        f"The encoder beside the adapter does not give its {TABLE!r}: one of the two is of another training. "
        "Take the encoder's file away to use the table, or save the adapter again.",
        unexpected=sorted(adapter.shared),
    )
