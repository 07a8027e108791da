"""What holds of every reading of virtual tokens that is not PEFT's, on every encoder."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import peftsurgery as ps
from peftsurgery.errors import PlanError
from tests.token_subjects import BERTS, LENGTH, PAD, SUBJECTS, TokenSubject

N = 5
ENCODERS = [subject for subject in SUBJECTS if subject.family == "encoder"]
BARE = {
    "bert": (tf.BertModel, tf.BertConfig),
    "roberta": (tf.RobertaModel, tf.RobertaConfig),
    "mpnet": (tf.MPNetModel, tf.MPNetConfig),
    "electra": (tf.ElectraModel, tf.ElectraConfig),
}
TAGGERS = {
    "bert": (tf.BertForTokenClassification, tf.BertConfig),
    "masked": (tf.RobertaForMaskedLM, tf.RobertaConfig),
    "qa": (tf.ElectraForQuestionAnswering, tf.ElectraConfig),
}
STRIP = ps.Reading(strip_virtual_outputs=True)
CLS = ps.Reading(pool="cls")
UNSHIFTED = ps.Reading(position_shift=False)


def wearing(model: nn.Module, method: ps.PromptTuning | ps.PrefixTuning, reading: ps.Reading) -> nn.Module:
    fresh = ps.inject(model, method, seed=3, reading=reading)
    for name, parameter in ps.trainable_parameters(fresh).items():
        if name.endswith("prompt_embeddings"):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(4))
    return fresh


def built(table: dict[str, tuple[type, type]], name: str) -> nn.Module:
    cls, config = table[name]
    sizes = {**BERTS, "num_labels": 2 if name == "qa" else 3}
    return TokenSubject(name, "encoder", lambda: cls(config(**sizes))).model()


def call() -> dict[str, Tensor]:
    return ENCODERS[0].inputs()


@pytest.mark.parametrize("name", sorted(TAGGERS))
@torch.no_grad()
def test_stripped_outputs_are_the_others_without_the_prompt(name: str) -> None:
    ours = wearing(built(TAGGERS, name), ps.PromptTuning(N), STRIP)(**call())
    pefts = wearing(built(TAGGERS, name), ps.PromptTuning(N), ps.Reading())(**call())
    for word in pefts:
        assert ours[word].shape[1] == LENGTH
        assert torch.equal(ours[word], pefts[word][:, N:])


@torch.no_grad()
def test_a_loss_does_not_see_the_strip() -> None:
    labels = torch.ones(2, LENGTH, dtype=torch.long)
    models = [wearing(built(TAGGERS, "bert"), ps.PromptTuning(N), way) for way in (STRIP, ps.Reading())]
    losses = [model(**call(), labels=labels).loss for model in models]
    assert torch.equal(*losses)
    plain = models[0](**call(), labels=labels, return_dict=False)
    assert torch.equal(plain[0], losses[0]) and plain[1].shape[1] == LENGTH


@pytest.mark.parametrize("name", sorted(BARE))
@torch.no_grad()
def test_bare_models_strip_their_states_and_keep_their_pooler(name: str) -> None:
    ours = wearing(built(BARE, name), ps.PromptTuning(N), STRIP)(**call())
    pefts = wearing(built(BARE, name), ps.PromptTuning(N), ps.Reading())(**call())
    assert torch.equal(ours.last_hidden_state, pefts.last_hidden_state[:, N:])
    if "pooler_output" in pefts:
        assert torch.equal(ours.pooler_output, pefts.pooler_output)


@torch.no_grad()
def test_a_bare_model_pools_the_first_word() -> None:
    model = wearing(built(BARE, "bert"), ps.PromptTuning(N), CLS)
    given = model(**call())
    pefts = wearing(built(BARE, "bert"), ps.PromptTuning(N), ps.Reading())(**call())
    assert torch.equal(given.last_hidden_state, pefts.last_hidden_state[:, N:])
    assert torch.equal(given.pooler_output, model.pooler(pefts.last_hidden_state[:, N:]))
    assert not torch.allclose(given.pooler_output, pefts.pooler_output)


@pytest.mark.parametrize("subject", ENCODERS, ids=str)
def test_a_classifier_reads_the_first_word(subject: TokenSubject) -> None:
    """Its head, on the last states without the prompt's, gives the same logits."""
    model = wearing(subject.model(), ps.PromptTuning(N), CLS)
    pefts = wearing(subject.model(), ps.PromptTuning(N), ps.Reading())
    assert not torch.allclose(subject.run(model), subject.run(pefts))
    expected = _cls_logits(subject, pefts)
    assert torch.allclose(subject.run(model), expected, atol=1e-6)
    before = subject.run(subject.model())
    ps.remove(model, "default")
    assert torch.equal(subject.run(model), before)


def _cls_logits(subject: TokenSubject, model: nn.Module) -> Tensor:
    """The logits of a model whose layers' output is cut by a hook of the test's own."""
    trunk = model.get_submodule(model.base_model_prefix)
    layers = trunk.encoder if subject.name in ("bert", "albert", "mpnet") else trunk

    def cut(module: nn.Module, args: object, output: object) -> object:
        states = output[0][:, N:]  # type: ignore[index]
        return type(output)(last_hidden_state=states) if not isinstance(output, tuple) else (states,)

    handle = layers.register_forward_hook(cut)
    logits = subject.run(model)
    handle.remove()
    return logits


@torch.no_grad()
def test_answers_are_numbered_as_they_are_given() -> None:
    model = wearing(built(TAGGERS, "qa"), ps.PromptTuning(N), STRIP)
    pefts = wearing(built(TAGGERS, "qa"), ps.PromptTuning(N), ps.Reading())
    starts, ends = torch.tensor([1, 2]), torch.tensor([3, 4])
    loss = model(**call(), start_positions=starts, end_positions=ends).loss
    moved = pefts(**call(), start_positions=starts + N, end_positions=ends + N).loss
    assert torch.equal(loss, moved)


@pytest.mark.parametrize("subject", [s for s in ENCODERS if s.name != "deberta-v2"], ids=str)
def test_a_prefix_without_a_shift_numbers_words_as_ever(subject: TokenSubject) -> None:
    """Shifted positions, shifted back by the caller, are the positions without a shift."""
    model = wearing(subject.model(), ps.PrefixTuning(N), UNSHIFTED)
    pefts = wearing(subject.model(), ps.PrefixTuning(N), ps.Reading())
    inputs = subject.inputs()
    ids = inputs["input_ids"]
    kept, skips = ids.ne(PAD).long(), subject.name in ("roberta", "mpnet")
    own = kept.cumsum(1) * kept + PAD if skips else torch.arange(LENGTH).expand(2, -1)
    with torch.no_grad():
        expected = pefts(**inputs, position_ids=own - N).logits
    assert torch.allclose(subject.run(model), expected, atol=1e-6)
    assert not torch.allclose(subject.run(model), subject.run(pefts), atol=1e-4)


@torch.no_grad()
def test_a_prefix_without_a_shift_leaves_all_positions_to_words() -> None:
    model = wearing(ENCODERS[0].model(), ps.PrefixTuning(N), UNSHIFTED)
    longest = torch.full((1, BERTS["max_position_embeddings"]), 5)
    assert model(input_ids=longest).logits.isfinite().all()


@pytest.mark.parametrize(
    ("name", "method", "reading", "match"),
    [
        ("bert", ps.PromptTuning(N), UNSHIFTED, "position_shift=False is for prefixes"),
        ("bert", ps.PromptTuning(N), STRIP, "nothing to strip"),
        ("bert", ps.PrefixTuning(N), STRIP, "prefix adds no tokens"),
        ("gpt2", ps.PrefixTuning(N), UNSHIFTED, "for encoders"),
        ("deberta-v2", ps.PrefixTuning(N), UNSHIFTED, "changes nothing"),
        ("gpt2", ps.PromptTuning(N), CLS, "does not"),
        ("t5", ps.PromptTuning(N), STRIP, "nothing to strip"),
        ("bert", ps.LoRA(r=2), STRIP, "for virtual tokens"),
    ],
)
def test_what_makes_no_sense_is_refused(
    name: str, method: ps.LoRA | ps.PromptTuning, reading: ps.Reading, match: str
) -> None:
    subject = next(s for s in SUBJECTS if s.name == name)
    model = subject.model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    targets = "query" if isinstance(method, ps.LoRA) else None
    with pytest.raises(PlanError, match=match):
        ps.inject(model, method, targets, reading=reading)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert ps.adapters(model) == ()


def test_a_strange_pool_is_refused() -> None:
    with pytest.raises(PlanError, match="'first' or 'cls'"):
        ps.Reading(pool="mean")


@torch.no_grad()
def test_a_decoder_strips_too() -> None:
    subject = next(s for s in SUBJECTS if s.name == "llama-gqa")
    ours = wearing(subject.model(), ps.PromptTuning(N), STRIP)
    pefts = wearing(subject.model(), ps.PromptTuning(N), ps.Reading())
    assert torch.equal(subject.run(ours), subject.run(pefts)[:, N:])
    words = {**subject.inputs(), "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(ours.generate(**words), pefts.generate(**words))
