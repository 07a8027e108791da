"""Virtual tokens on every architecture against live PEFT: forward passes, losses and generation, to 1e-5."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import peftsurgery as ps
from peftsurgery.errors import UnsupportedSite
from peftsurgery.method import TABLE, TokenMethod
from tests.token_subjects import BERTS, LLAMAS, SUBJECTS, TokenSubject

N, HIDDEN, TOLERANCE = 5, 12, 1e-5
TASKS = {"encoder": "SEQ_CLS", "decoder": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}
METHODS: dict[str, tuple[Callable[[int], TokenMethod], type[Any], dict[str, Any]]] = {
    "prompt": (lambda halves: ps.PromptTuning(N, halves), peft.PromptTuningConfig, {}),
    "p-tuning-mlp": (
        lambda halves: ps.PTuning(N, encoder_hidden_size=HIDDEN, num_transformer_submodules=halves),
        peft.PromptEncoderConfig,
        {"encoder_hidden_size": HIDDEN},
    ),
    "p-tuning-lstm": (
        lambda halves: ps.PTuning(N, "LSTM", encoder_hidden_size=HIDDEN, num_transformer_submodules=halves),
        peft.PromptEncoderConfig,
        {"encoder_hidden_size": HIDDEN, "encoder_reparameterization_type": "LSTM"},
    ),
    "prefix": (lambda _: ps.PrefixTuning(N), peft.PrefixTuningConfig, {}),
    "prefix-projected": (
        lambda _: ps.PrefixTuning(N, True, HIDDEN),
        peft.PrefixTuningConfig,
        {"prefix_projection": True, "encoder_hidden_size": HIDDEN},
    ),
}
PREFIXES = ("prefix", "prefix-projected")
REFUSED = {
    *(
        (name, method)
        for name in ("mpnet", "albert", "distilbert", "modernbert", "deberta-v2")
        for method in PREFIXES
    )
}
"""What PEFT cannot run: these models take no past keys and values. Ours run: see the laws."""
NARROW = {"electra": 16, "albert": 16}
"""Models whose word embeddings are narrower than their layers, where PEFT has to be told."""
PAIRS = [
    pytest.param(subject, method, id=f"{subject}-{method}")
    for subject in SUBJECTS
    for method in METHODS
    if (subject.name, method) not in REFUSED
]
every = pytest.mark.parametrize(("subject", "word"), PAIRS)
decoding = pytest.mark.parametrize(
    ("subject", "word"), [pair for pair in PAIRS if pair.values[0].family != "encoder"]
)


def config(word: str, task: str, name: str = "") -> Any:
    _, kind, words = METHODS[word]
    sizes = {"num_layers": 2, "num_attention_heads": 4}
    if name in NARROW and word not in PREFIXES:
        sizes["token_dim"] = NARROW[name]
    elif name == "distilbert":
        sizes["token_dim"] = 32
    told = sizes if "token_dim" in sizes else {}
    return kind(task_type=task, num_virtual_tokens=N, **told, **words)


def both(model: Callable[[], nn.Module], word: str, task: str, name: str = "") -> tuple[nn.Module, nn.Module]:
    """The model with one and the same adapter: in our hands, and in PEFT's."""
    torch.manual_seed(3)
    theirs = peft.get_peft_model(model(), config(word, task, name)).eval()
    encoder = theirs.prompt_encoder["default"].state_dict()
    method = METHODS[word][0](2 if task == "SEQ_2_SEQ_LM" else 1)
    mine = model()
    plan = ps.plan(mine, method, task="feature-extraction")
    names = method.shared_shapes(plan.sites)
    shared = {key: encoder["embedding.weight" if key == TABLE else key] for key in names}
    ps.inject(mine, ps.Adapter(plan, {site.name: {} for site in plan.sites}, shared=shared))
    return mine, theirs


def gap(mine: Tensor, theirs: Tensor) -> float:
    assert mine.shape == theirs.shape
    return float((mine - theirs).abs().max())


@every
@torch.no_grad()
def test_forward(subject: TokenSubject, word: str) -> None:
    mine, theirs = both(subject.model, word, TASKS[subject.family], subject.name)
    for padded in (True, False):
        call = subject.inputs(padded)
        assert gap(mine(**call).logits, theirs(**call).logits) <= TOLERANCE
    plain = subject.run(subject.model())
    assert plain.shape != subject.run(mine).shape or gap(plain, subject.run(mine)) > 1e-3


@decoding
@torch.no_grad()
def test_generation(subject: TokenSubject, word: str) -> None:
    mine, theirs = both(subject.model, word, TASKS[subject.family], subject.name)
    wanted = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 7}
    for padded, words in ((True, {}), (False, {}), (True, {"do_sample": True}), (True, {"num_beams": 3})):
        call = {key: value for key, value in subject.inputs(padded).items() if key != "decoder_input_ids"}
        results = []
        for model in (mine, theirs):
            torch.manual_seed(0)
            results.append(model.generate(**call, **wanted, **words))
        assert torch.equal(results[0].sequences, results[1].sequences)
        assert gap(torch.stack(results[0].logits), torch.stack(results[1].logits)) <= TOLERANCE


@decoding
def test_losses_and_gradients(subject: TokenSubject, word: str) -> None:
    mine, theirs = both(subject.model, word, TASKS[subject.family], subject.name)
    call = {key: value for key, value in subject.inputs().items() if key != "decoder_input_ids"}
    labels = call["input_ids"].masked_fill(call["attention_mask"] == 0, -100)
    losses = [model(**call, labels=labels).loss for model in (mine, theirs)]
    assert gap(losses[0], losses[1]) <= TOLERANCE
    for loss in losses:
        loss.backward()
    own = {name.split(".default.")[1]: p.grad for name, p in ps.trainable_parameters(mine).items()}
    encoder = dict(theirs.prompt_encoder["default"].named_parameters())
    for name, gradient in own.items():
        assert gap(gradient, encoder["embedding.weight" if name == TABLE else name].grad) <= TOLERANCE


def _bert(head: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return getattr(tf, f"Bert{head}")(tf.BertConfig(**{**BERTS, "num_labels": 2})).eval()

    return build


def _llama() -> nn.Module:
    torch.manual_seed(0)
    return tf.LlamaForSequenceClassification(tf.LlamaConfig(**LLAMAS)).eval()


HEADS = {
    "tokens": (_bert("ForTokenClassification"), "TOKEN_CLS", ("logits",)),
    "answers": (_bert("ForQuestionAnswering"), "QUESTION_ANS", ("start_logits", "end_logits")),
    "features": (_bert("Model"), "FEATURE_EXTRACTION", ("last_hidden_state", "pooler_output")),
    "decoder-classes": (_llama, "SEQ_CLS", ("logits",)),
}


@pytest.mark.parametrize("word", ["prompt", "prefix"])
@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_other_heads(head: str, word: str) -> None:
    build, task, outputs = HEADS[head]
    mine, theirs = both(build, word, task)
    family = "decoder" if head == "decoder-classes" else "encoder"
    call = next(subject for subject in SUBJECTS if subject.family == family).inputs()
    if task in ("SEQ_CLS", "TOKEN_CLS"):  # for other tasks PEFT drops the token types; ours stay
        call["token_type_ids"] = call["input_ids"] % 2
    results = [model(**call) for model in (mine, theirs)]
    for name in outputs:
        assert gap(results[0][name], results[1][name]) <= TOLERANCE


@torch.no_grad()
def test_an_encoder_that_no_table_knows() -> None:
    sizes = {**BERTS, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
    subject = TokenSubject(
        "deberta", "encoder", lambda: tf.DebertaForSequenceClassification(tf.DebertaConfig(**sizes))
    )
    mine, theirs = both(subject.model, "prompt", "SEQ_CLS")
    assert gap(subject.run(mine), subject.run(theirs)) <= TOLERANCE
    with pytest.raises(UnsupportedSite, match="prompt tuning"):
        ps.plan(subject.model(), ps.PrefixTuning(N))


@pytest.mark.parametrize(("name", "word"), sorted(REFUSED))
def test_what_peft_refuses_is_still_refused(name: str, word: str) -> None:
    subject = next(subject for subject in SUBJECTS if subject.name == name)
    with pytest.raises(ValueError, match="past key values"):
        peft.get_peft_model(subject.model(), config(word, "SEQ_CLS", name))(**subject.inputs())


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize(
    "method", [ps.PromptTuning(N), ps.PTuning(N, encoder_hidden_size=16)], ids=["prompt", "p"]
)
@torch.no_grad()
def test_a_fresh_prompt_has_a_table_for_each_half(
    name: str, method: ps.PromptTuning | ps.PTuning, tmp_path: Path
) -> None:
    subject = next(subject for subject in SUBJECTS if subject.name == name)
    mine = ps.inject(subject.model(), method, seed=1)
    given = subject.run(mine)
    adapter = ps.remove(mine, "default")
    ps.save_adapter(adapter, tmp_path / "a")
    assert adapter.plan.steps[0].method.baked().num_transformer_submodules == 2
    theirs = peft.PeftModel.from_pretrained(subject.model(), tmp_path / "a").eval()
    assert gap(given, subject.run(theirs)) <= TOLERANCE
