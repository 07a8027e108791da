"""What AdapterHub's files call the parts of an architecture: its `model_type`, and transformers 4's names.

Written against adapters 1.3.0, which runs on transformers 4.57. Where a later transformers renamed modules, both
spellings are here; a model type that is not listed has one spelling, and no head is written for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Spelling = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Naming:
    """The names of one architecture.

    Args:
        prefix: where a model with a head keeps its base.
        stem: how the names of its classes begin.
        spelling: parts of names in AdapterHub's files, and what they are called here.
    """

    prefix: str
    stem: str
    spelling: Spelling = ()


_VIT: Spelling = (
    ("encoder.layer.", "layers."),
    (".attention.attention.query", ".attention.q_proj"),
    (".attention.attention.key", ".attention.k_proj"),
    (".attention.attention.value", ".attention.v_proj"),
    (".intermediate.dense", ".mlp.fc1"),
    (".output.dense", ".mlp.fc2"),
)

NAMINGS: Mapping[str, Naming] = {
    "albert": Naming("albert", "Albert"),
    "bart": Naming("model", "Bart"),
    "beit": Naming("beit", "Beit", _VIT),
    "bert": Naming("bert", "Bert"),
    "deberta-v2": Naming("deberta", "DebertaV2"),
    "distilbert": Naming("distilbert", "DistilBert"),
    "electra": Naming("electra", "Electra"),
    "gpt2": Naming("transformer", "GPT2"),
    "gptj": Naming("transformer", "GPTJ"),
    "llama": Naming("model", "Llama"),
    "mistral": Naming("model", "Mistral"),
    "mt5": Naming("transformer", "MT5"),
    "roberta": Naming("roberta", "Roberta"),
    "t5": Naming("transformer", "T5"),
    "vit": Naming("vit", "ViT", _VIT),
    "xlm-roberta": Naming("roberta", "XLMRoberta"),
}
UNKNOWN = Naming("", "")


def naming(model_type: str | None) -> Naming:
    """The names of an architecture; of one that is not listed, none."""
    return NAMINGS.get(model_type or "", UNKNOWN)


def ours(name: str, model_type: str | None) -> str:
    """A name of AdapterHub's files as today's transformers says it."""
    for theirs, mine in naming(model_type).spelling:
        name = name.replace(theirs, mine)
    return name


def theirs(name: str, model_type: str | None) -> str:
    """A name as AdapterHub's files say it, below the base's prefix where that is known.

    Without the prefix AdapterHub gives a fusion random weights on a model with a head; with it, every model
    finds its own.
    """
    known = naming(model_type)
    for old, mine in known.spelling:
        name = name.replace(mine, old)
    return f"{known.prefix}.{name}" if known.prefix and not name.startswith(f"{known.prefix}.") else name
