"""The words for tasks: Hugging Face's, PEFT's, and the names of their outputs and heads."""

from __future__ import annotations

from dataclasses import dataclass

from peftsurgery.errors import PlanError, listing


@dataclass(frozen=True, slots=True)
class Task:
    """One task.

    Args:
        name: what Hugging Face calls it (`text-classification` is `sequence-classification` here).
        peft: PEFT's `task_type`; None where it has no word for it, as for images.
        auto: the transformers class that loads a model for it.
        suffix: how the class names of such models end.
        heads: the modules that PEFT trains and saves beside the adapter, where the model has them.
    """

    name: str
    peft: str | None
    auto: str
    suffix: str
    heads: tuple[str, ...] = ()


TASKS = (
    Task(
        "sequence-classification",
        "SEQ_CLS",
        "AutoModelForSequenceClassification",
        "ForSequenceClassification",
        ("classifier", "score"),
    ),
    Task(
        "token-classification",
        "TOKEN_CLS",
        "AutoModelForTokenClassification",
        "ForTokenClassification",
        ("classifier", "score"),
    ),
    Task(
        "question-answering",
        "QUESTION_ANS",
        "AutoModelForQuestionAnswering",
        "ForQuestionAnswering",
        ("qa_outputs",),
    ),
    Task("fill-mask", "MASKED_LM", "AutoModelForMaskedLM", "ForMaskedLM"),
    Task("text-generation", "CAUSAL_LM", "AutoModelForCausalLM", "ForCausalLM"),
    Task("text2text-generation", "SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM", "ForConditionalGeneration"),
    Task("image-classification", None, "AutoModelForImageClassification", "ForImageClassification"),
    Task("feature-extraction", "FEATURE_EXTRACTION", "AutoModel", "Model"),
)
OLDEST = {"LMHeadModel": "text-generation", "MTModel": "text2text-generation"}
"""How the class names of the oldest decoders and encoder-decoders end, and what they are for."""
SHORT = {
    "seq-cls": "sequence-classification",
    "text-classification": "sequence-classification",
    "token-cls": "token-classification",
    "qa": "question-answering",
    "masked-lm": "fill-mask",
    "causal-lm": "text-generation",
    "seq2seq-lm": "text2text-generation",
    "image-cls": "image-classification",
}


def task(word: str) -> Task:
    """The task that a word names: optimum's (`fill-mask`), PEFT's (`SEQ_CLS`) or short (`seq-cls`).

    Raises:
        PlanError: no task is called so.
    """
    name = SHORT.get(word.lower(), word)
    for known in TASKS:
        if name in (known.name, known.peft):
            return known
    raise PlanError(f"{word!r} is no task. Take one of {listing([t.name for t in TASKS], len(TASKS))}.")


def task_of(class_name: str) -> Task | None:
    """The task of a model class, by how its name ends; a projection on top changes nothing."""
    plain = class_name.removesuffix("WithProjection")
    for end, word in OLDEST.items():
        if plain.endswith(end):
            return task(word)
    return next((known for known in TASKS if plain.endswith(known.suffix)), None)
