"""What a model takes and gives, and which models are refused."""

from __future__ import annotations

import pytest
import torch
import transformers as t
from torch import nn

from peftsurgery.errors import PlanError, UnsupportedModel
from peftsurgery.graph.signature import BATCH, LENGTH, Port, signature
from tests.units.graphs import CONFIG, bert

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
IDS = ("input_ids", "attention_mask")


def names(model: nn.Module, task: str | None = None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    said = signature(model, task)
    return tuple(port.name for port in said.inputs), tuple(port.name for port in said.outputs)


def test_ports_have_names_dtypes_and_axes() -> None:
    said = signature(bert(torch.bfloat16))
    assert said.inputs[0] == Port("input_ids", "int64", (BATCH, LENGTH))
    assert said.outputs == (Port("logits", "bfloat16", (BATCH, LENGTH, 3)),)
    assert (said.task, said.vocab_size, said.pad_id) == ("token-classification", 101, 0)


@pytest.mark.parametrize("word", ["feature-extraction", "FEATURE_EXTRACTION", None])
def test_the_words_for_a_task(word: str | None) -> None:
    assert names(t.BertModel(CONFIG), word)[1] == ("last_hidden_state", "pooler_output")


def test_a_pooler_that_is_not_there_gives_no_output() -> None:
    assert names(t.BertModel(CONFIG, add_pooling_layer=False))[1] == ("last_hidden_state",)


def test_token_types_are_an_input_only_where_there_are_several() -> None:
    roberta = t.RobertaModel(t.RobertaConfig(**SMALL, vocab_size=101, type_vocab_size=1))
    assert names(bert())[0] == (*IDS, "token_type_ids")
    assert names(roberta)[0] == IDS
    assert signature(roberta).longest == roberta.config.max_position_embeddings - 2


@pytest.mark.parametrize(("name", "unused"), [("Bert", 0), ("Electra", 0), ("Roberta", 2), ("MPNet", 2)])
def test_the_longest_input_is_the_longest_that_runs(name: str, unused: int) -> None:
    sizes = {**SMALL, "vocab_size": 101, "max_position_embeddings": 24}
    model = getattr(t, f"{name}Model")(getattr(t, f"{name}Config")(**sizes)).eval()
    longest = signature(model).longest
    assert longest == 24 - unused
    assert model(torch.full((1, longest), 5)).last_hidden_state.isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, longest + 1), 5))


def test_images_have_the_size_that_the_configuration_says() -> None:
    config = t.ViTConfig(**SMALL, image_size=(8, 12), patch_size=4, num_channels=1, num_labels=5)
    said = signature(t.ViTForImageClassification(config).half(), "image-cls")
    assert said.inputs == (Port("pixel_values", "float16", (BATCH, 1, 8, 12)),)
    assert said.outputs == (Port("logits", "float16", (BATCH, 5)),)
    assert (said.task, said.longest) == ("image-classification", 0)
    features = signature(t.ViTModel(config, add_pooling_layer=False))
    assert features.outputs == (Port("last_hidden_state", "float32", (BATCH, 7, 32)),)
    assert not features.outputs[0].per_token


def test_the_model_is_left_in_its_mode() -> None:
    model = bert().train()
    model.bert.pooler = None
    model.bert.encoder.layer[0].eval()
    before = [module.training for module in model.modules()]
    signature(model)
    assert [module.training for module in model.modules()] == before


REFUSED = [
    (lambda: t.BertLMHeadModel(t.BertConfig(**SMALL, vocab_size=101)), "no decoder"),
    (
        lambda: t.T5Model(t.T5Config(d_model=32, d_ff=48, num_layers=1, num_heads=4, vocab_size=101)),
        "decoder",
    ),
    (lambda: t.CLIPModel(t.CLIPConfig()), "over tokens"),
    (lambda: nn.Linear(2, 2), "over tokens"),
    (lambda: t.BertForNextSentencePrediction(CONFIG), "no task"),
]


@pytest.mark.parametrize(("build", "why"), REFUSED)
def test_what_cannot_be_exported_is_refused(build: object, why: str) -> None:
    model = build()  # type: ignore[operator]
    with pytest.raises(UnsupportedModel, match=why) as caught:
        signature(model)
    assert type(model).__name__ in str(caught.value)
    assert "export" in str(caught.value)


def test_a_task_that_the_model_does_not_play() -> None:
    with pytest.raises(UnsupportedModel, match=r"'start_logits', 'end_logits'.*AutoModelForQuestion"):
        signature(bert(), "qa")
    with pytest.raises(UnsupportedModel, match="is no decoder"):
        signature(bert(), "causal-lm")
    with pytest.raises(PlanError, match="'poetry' is no task"):
        signature(bert(), "poetry")
