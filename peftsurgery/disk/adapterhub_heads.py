"""AdapterHub's prediction heads, and the modules of transformers' own heads that compute the same.

A head is a list of modules, `heads.<name>.<number>`: for every layer a dropout, a linear map and, but for the last, an
activation. Which list is which class's own head says adapters 1.3.0 in its table of heads; one more is exact: where
BERT's head has two layers with a tanh between them and reads the first token, the first layer is the pooler.
Heads of models that transformers gives a head itself are stored under transformers' names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from peftsurgery.adapter import Adapter
from peftsurgery.disk.adapterhub_config import Config
from peftsurgery.disk.adapterhub_keys import own
from peftsurgery.disk.adapterhub_models import NAMINGS, naming
from peftsurgery.errors import AdapterError, MismatchedTensors, listing
from peftsurgery.tasks import TASKS, task, task_of

HEAD = "head_config.json"
SAFE, PICKLE = "model_head.safetensors", "pytorch_model_head.bin"
TASK_OF = {
    "classification": "SEQ_CLS",
    "multilabel_classification": "SEQ_CLS",
    "tagging": "TOKEN_CLS",
    "question_answering": "QUESTION_ANS",
    "image_classification": None,
}
"""AdapterHub's words for what a head does, and PEFT's."""
LAST = tuple(f".{module}.weight" for module in ("classifier", "score", "qa_outputs", "out_proj"))
"""How the name of a head's last map ends, which has a row for every label."""


@dataclass(frozen=True, slots=True)
class Form:
    """A head that a class of transformers has itself.

    Args:
        modules: the names of its linear maps, in their order; `{base}` is where the base is.
        activation: what is between the first two.
        use_pooler: whether it reads what the pooler gives, or the first token's state.
        bias: whether the last map has one.
    """

    modules: tuple[str, ...]
    activation: str | None = None
    use_pooler: bool = False
    bias: bool = True


_POOLED = Form(("classifier",), use_pooler=True)
_POOLER = Form(("{base}.pooler.dense", "classifier"), "tanh")
_DENSE = ("classifier.dense", "classifier.out_proj")
_BART = Form(("classification_head.dense", "classification_head.out_proj"), "tanh")
_SCORE = Form(("score",), bias=False)

CLASSIFIERS: Mapping[str, tuple[Form, ...]] = {
    "albert": (_POOLED,),
    "bart": (_BART,),
    "bert": (_POOLED, _POOLER),
    "deberta-v2": (Form(("pooler.dense", "classifier"), "gelu"),),
    "distilbert": (Form(("pre_classifier", "classifier"), "relu"),),
    "electra": (Form(_DENSE, "gelu"),),
    "gpt2": (_SCORE,),
    "llama": (_SCORE,),
    "mistral": (_SCORE,),
    "mt5": (_BART,),
    "roberta": (Form(_DENSE, "tanh"),),
    "t5": (_BART,),
    "vit": (),
    "xlm-roberta": (Form(_DENSE, "tanh"),),
}
"""Model type → the heads for whole inputs that its class for sequences has."""
TAGGERS = {**dict.fromkeys(NAMINGS, "classifier"), **dict.fromkeys(("llama", "mistral"), "score")}


@dataclass(frozen=True, slots=True)
class Head:
    """A head as whole tensors of the model, and PEFT's word for its task."""

    tensors: Mapping[str, Tensor]
    task_type: str | None


def understood(raw: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Head:
    """The head that a head's two files make.

    Raises:
        AdapterError: no class of transformers has such a head.
        MismatchedTensors: tensors are missing, unexpected or of no floating dtype.
    """
    config, model_type = raw.get("config"), raw.get("model_type")
    kind = model_type if isinstance(model_type, str) else None
    if config is None:
        return _static(str(raw.get("model_class")), kind, tensors)
    if not isinstance(config, dict) or not isinstance(raw.get("name"), str):
        raise AdapterError(f"{HEAD} says no head (`config` is {repr(config)[:40]}). Save the adapter again.")
    return _flexible(config, str(raw["name"]), kind, tensors)


def written(adapter: Adapter) -> tuple[Config, list[tuple[str, Tensor]]] | None:
    """The configuration and the tensors of the adapter's head, as of a class of transformers; None of no head.

    Raises:
        AdapterError: what it replaces is no head, or the class is not known.
    """
    if not adapter.replaced:
        return None
    known = naming(adapter.model_type)
    base = f"{known.prefix}.pooler.dense"
    strange = [name for name in adapter.replaced if not _is_head(name, base)]
    if strange:
        raise AdapterError(
            f"The adapter replaces {listing(strange)}, which is no head, and AdapterHub's format holds heads alone. "
            "Keep PEFT's format, or train without it."
        )
    if not known.stem or adapter.task_type is None:
        raise AdapterError(
            f"The adapter has a head, and AdapterHub's file says for which class: that needs the model's type "
            f"({adapter.model_type}) and the task ({adapter.task_type}). Name the base: `convert … --base MODEL`."
        )
    labels = next(
        (len(tensor) for name, tensor in adapter.replaced.items() if f".{name}".endswith(LAST)), None
    )
    config: Config = {
        "config": None,
        "num_labels": labels,
        "label2id": labels and {f"LABEL_{label}": label for label in range(labels)},
        "model_class": known.stem + task(adapter.task_type).suffix,
    }
    return config, list(adapter.replaced.items())


def _static(model_class: str, model_type: str | None, tensors: Mapping[str, Tensor]) -> Head:
    base = f"{naming(model_type).prefix}.pooler.dense"
    strange = [name for name in tensors if not _is_head(name, base) or not tensors[name].is_floating_point()]
    if strange or not tensors:
        raise MismatchedTensors(
            f"The head's file holds {listing(strange) or 'nothing'}, which is no head of {model_class}. "
            f"{_without()}",
            unexpected=strange,
        )
    found = task_of(model_class)
    return Head(dict(tensors), found.peft if found is not None else None)


def _flexible(
    config: Mapping[str, object], name: str, kind: str | None, tensors: Mapping[str, Tensor]
) -> Head:
    head_type, layers = config.get("head_type"), config.get("layers")
    form = next((f for f in _forms(kind, head_type) if _is(f, config)), None)
    if form is None:
        raise AdapterError(
            f"No class of transformers has the head {name!r} of this adapter ({head_type!r} of {kind!r}, {layers} "
            f"layers, {config.get('activation_function')!r}, use_pooler {config.get('use_pooler')}). {_without()}"
        )
    numbers = [1 + 3 * layer for layer in range(len(form.modules))]
    base = naming(kind).prefix
    names = {
        f"heads.{name}.{number}.{leaf}": f"{module.format(base=base)}.{leaf}"
        for number, module in zip(numbers, form.modules, strict=True)
        for leaf in (("weight", "bias") if form.bias or number != numbers[-1] else ("weight",))
    }
    tensors = own(tensors, "heads", name)
    missing, strange = sorted(names.keys() - tensors.keys()), sorted(tensors.keys() - names.keys())
    if missing or strange:
        raise MismatchedTensors(
            f"The head {name!r} has {listing(sorted(tensors))}, and its configuration announces "
            f"{listing(sorted(names))}. The two files are not of one head.",
            missing=missing,
            unexpected=strange,
        )
    return Head({names[key]: tensor for key, tensor in tensors.items()}, TASK_OF[str(head_type)])


def _forms(kind: str | None, head_type: object) -> tuple[Form, ...]:
    if kind is None or kind not in CLASSIFIERS or head_type not in TASK_OF:
        return ()
    if head_type == "tagging":
        return (Form((TAGGERS[kind],)),)
    if head_type == "question_answering":
        return (Form(("qa_outputs",)),)
    if head_type == "image_classification":
        return (Form(("classifier",)),) if kind == "vit" else ()
    return CLASSIFIERS[kind]


def _is(form: Form, config: Mapping[str, object]) -> bool:
    pooled = bool(config.get("use_pooler", False))
    return (
        config.get("layers") == len(form.modules)
        and (len(form.modules) == 1 or config.get("activation_function") == form.activation)
        and pooled == form.use_pooler
        and bool(config.get("bias", True)) == form.bias
    )


def _is_head(name: str, pooler: str) -> bool:
    module = name.rpartition(".")[0]
    known = [head for known in TASKS for head in known.heads]
    known += ["pre_classifier", "classification_head", "pooler"]
    return module == pooler or re.split(r"\.", module)[0] in known


def _without() -> str:
    return f"Take {HEAD} away to use the adapter without its head."
