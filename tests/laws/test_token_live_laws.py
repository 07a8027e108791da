"""The laws of virtual tokens on a live model, for every architecture and method; identity is none of them."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import peftsurgery as ps
from peftsurgery.errors import InputTooLong, MismatchedTensors, PlanError, UnclaimedSites
from peftsurgery.live import surgery
from peftsurgery.method import TokenMethod
from tests.laws.test_live_laws import assert_same, snapshot
from tests.subjects import transformer
from tests.token_subjects import BERTS, GPT2, LENGTH, LLAMAS, OPT, PAD, SUBJECTS, TokenSubject

N = 5
METHODS = {
    "prompt": ps.PromptTuning(N),
    "prompt-2": ps.PromptTuning(N, num_transformer_submodules=2),
    "p-tuning-mlp": ps.PTuning(N, encoder_hidden_size=12),
    "p-tuning-lstm": ps.PTuning(N, "LSTM", encoder_hidden_size=12),
    "prefix": ps.PrefixTuning(N),
    "prefix-projected": ps.PrefixTuning(N, prefix_projection=True, encoder_hidden_size=12),
}
HALVES = "prompt-2"
BY_NAME = {subject.name: subject for subject in SUBJECTS}
PAIRS = [
    pytest.param(subject, method, id=f"{subject}-{name}")
    for subject in SUBJECTS
    for name, method in METHODS.items()
    if name != HALVES or subject.family == "seq2seq"
]
every = pytest.mark.parametrize(("subject", "method"), PAIRS)
decoding = pytest.mark.parametrize(
    ("subject", "method"), [pair for pair in PAIRS if pair.values[0].family != "encoder"]
)
FEATURES = "feature-extraction"


def grafted(subject: TokenSubject, method: TokenMethod, seed: int = 0, name: str = "default") -> nn.Module:
    """The subject with a fresh adapter and no head of its own."""
    model = subject.model()
    assert ps.inject(model, method, seed=seed, task=FEATURES, name=name) is model
    return model


def generated(subject: TokenSubject, model: nn.Module, **words: Any) -> Tensor:
    call = {key: value for key, value in subject.inputs().items() if key != "decoder_input_ids"}
    torch.manual_seed(0)
    return model.generate(**call, **{"max_new_tokens": 6, "do_sample": False, **words})


def hooks_of(model: nn.Module) -> list[int]:
    return [len(module._forward_pre_hooks) for module in model.modules()]


@every
def test_removal(subject: TokenSubject, method: TokenMethod) -> None:
    model = subject.model()
    next(model.parameters()).requires_grad_(False)
    before, hooks, out = snapshot(model), hooks_of(model), subject.run(model)
    adapter = ps.remove(grafted(subject, method))
    ps.inject(model, adapter)
    changed = subject.run(model)
    assert changed.shape != out.shape or (changed - out).abs().max() > 1e-3
    assert sum(hooks_of(model)) in (1, 2)
    assert ps.remove(model) == adapter
    assert_same(before, model)
    assert hooks_of(model) == hooks
    assert torch.equal(subject.run(model), out)


@decoding
def test_generation_is_given_back(subject: TokenSubject, method: TokenMethod) -> None:
    model = subject.model()
    words = {"output_logits": True, "return_dict_in_generate": True}
    before = generated(subject, model, **words)
    ps.inject(model, method, seed=0)
    assert not torch.equal(generated(subject, model, **words).logits[0], before.logits[0])
    ps.remove(model)
    after = generated(subject, model, **words)
    assert torch.equal(after.sequences, before.sequences)
    assert torch.equal(torch.stack(after.logits), torch.stack(before.logits))


@decoding
def test_generation_is_the_same_without_a_cache(subject: TokenSubject, method: TokenMethod) -> None:
    model = grafted(subject, method)
    for words in ({}, {"do_sample": True}, {"num_beams": 2}):
        cached = generated(subject, model, **words)
        assert torch.equal(generated(subject, model, use_cache=False, **words), cached)


@pytest.mark.parametrize("method", [METHODS["prompt"], METHODS["prefix"]], ids=lambda method: method.name)
@pytest.mark.parametrize("subject", [s for s in SUBJECTS if s.family == "decoder"], ids=str)
def test_a_conversation_goes_on_from_its_cache(subject: TokenSubject, method: TokenMethod) -> None:
    model = grafted(subject, method)
    words = subject.inputs()["input_ids"][:1]
    first = model.generate(words, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    whole = torch.cat([first.sequences, torch.tensor([[9, 8, 9, 8, 7, 6, 5]])], dim=1)
    told = {"attention_mask": torch.ones_like(whole), "max_new_tokens": 4, "do_sample": False}
    expected = model.generate(whole, **told)[:, -4:]
    cache = copy.deepcopy(first.past_key_values)
    with pytest.raises(PlanError, match="not in the cache"):
        model.generate(whole, past_key_values=cache, **told)
    new = whole[:, first.sequences.shape[1] - 1 :]  # the last generated word was never read
    going_on = model.generate(new, past_key_values=first.past_key_values, **told)
    assert torch.equal(going_on[:, -4:], expected)
    assert torch.equal(model.generate(whole, prompt_lookup_num_tokens=3, **told)[:, -4:], expected)
    assert torch.equal(model.generate(whole, prefill_chunk_size=4, **told)[:, -4:], expected)
    with pytest.raises(PlanError, match="a cache that grows"):
        model.generate(whole, cache_implementation="static", **told)
    with pytest.raises(PlanError, match="4-dimensional"):
        model(whole, attention_mask=torch.ones(1, 1, whole.shape[1], whole.shape[1], dtype=torch.bool))


@every
def test_training_moves_theta_only(subject: TokenSubject, method: TokenMethod) -> None:
    model = grafted(subject, method).train()
    theta = set(ps.trainable_parameters(model))
    assert theta == {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(theta) == len(ps.remove(copy.deepcopy(model)).shared)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    model(**subject.inputs()).logits.float().pow(2).sum().backward()
    still = {name for name, p in ps.trainable_parameters(model).items() if p.grad is None or not p.grad.any()}
    assert not still
    optimiser.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == theta


@every
def test_copies_and_pickles(subject: TokenSubject, method: TokenMethod) -> None:
    model = grafted(subject, method)
    before, plain = subject.run(model), subject.run(subject.model())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(subject.run(twin), before)
        with torch.no_grad():
            for parameter in ps.trainable_parameters(twin).values():
                parameter.mul_(-1)
        assert not torch.equal(subject.run(twin), before)
        ps.remove(twin)
        assert torch.equal(subject.run(twin), plain)
        assert torch.equal(subject.run(model), before)
    other = grafted(subject, method, seed=5)
    assert not torch.equal(subject.run(other), before)
    other.load_state_dict(model.state_dict())
    assert torch.equal(subject.run(other), before)


@every
def test_baking_changes_no_output(subject: TokenSubject, method: TokenMethod) -> None:
    model = grafted(subject, method)
    before = subject.run(model)
    ps.inject(model, ps.bake(ps.remove(model)))
    assert set(ps.trainable_parameters(model)) and len(ps.trainable_parameters(model)) == 1
    assert (subject.run(model) - before).abs().max() <= 1e-6


@every
def test_activation(subject: TokenSubject, method: TokenMethod) -> None:
    model, plain = grafted(subject, method, name="soft"), subject.run(subject.model())
    alone = subject.run(model)
    ps.activate(model)
    assert torch.equal(subject.run(model), plain)
    ps.activate(model, "soft")
    assert torch.equal(subject.run(model), alone)


@every
def test_beside_a_lora(subject: TokenSubject, method: TokenMethod) -> None:
    model = grafted(subject, method, name="soft")
    soft = subject.run(model)
    ps.inject(model, ps.LoRA(r=2, init_lora_weights="gaussian"), "all-linear", name="lora", task=FEATURES)
    with torch.no_grad():
        for parameter in ps.trainable_parameters(model).values():
            parameter.add_(0.05)
    both = subject.run(model)
    tokens = ps.remove(model, "soft")
    lora = subject.run(model)
    assert not torch.equal(both, lora)
    ps.inject(model, tokens)
    assert torch.equal(subject.run(model), both)
    ps.remove(model, "lora")
    ps.inject(subject.model(), tokens)
    assert not torch.equal(subject.run(model), soft)


@every
def test_failure_leaves_the_model(
    subject: TokenSubject, method: TokenMethod, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, adapter = subject.model(), ps.remove(grafted(subject, method))
    before, hooks = snapshot(model), hooks_of(model)

    def failing(*_: object) -> None:
        raise KeyboardInterrupt

    for step in ("swap", "hook", "require_grad"):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(surgery, step, failing)
            ps.inject(model, adapter)
        assert_same(dict(before), model)
        assert hooks_of(model) == hooks


@every
def test_an_adapter_of_another_base_is_refused(subject: TokenSubject, method: TokenMethod) -> None:
    model = subject.model()
    before, adapter = snapshot(model), ps.remove(grafted(subject, method))
    name, tensor = next(iter(adapter.shared.items()))
    wrong = ps.Adapter(adapter.plan, adapter.params, shared={**adapter.shared, name: tensor[:, :-1].clone()})
    with pytest.raises((MismatchedTensors, UnclaimedSites)):
        ps.inject(model, wrong)
    with pytest.raises(PlanError, match="leave out targets"):
        ps.inject(model, method, "query")
    assert_same(before, model)


LEARNED = [
    BY_NAME[name] for name in ("bert", "roberta", "mpnet", "albert", "distilbert", "gpt2", "opt", "bart")
]


@pytest.mark.parametrize("method", [METHODS["prompt"], METHODS["prefix"]], ids=lambda method: method.name)
@pytest.mark.parametrize("subject", LEARNED, ids=str)
def test_the_longest_input(subject: TokenSubject, method: TokenMethod) -> None:
    model = grafted(subject, method)
    at = (
        "decoder_input_ids" if subject.family == "seq2seq" and method.name == "prefix-tuning" else "input_ids"
    )
    rows = {key: value for key, value in subject.inputs(padded=False).items() if key != "attention_mask"}

    def run(length: int) -> Tensor:
        with torch.no_grad():
            return model(**{**rows, at: torch.full((2, length), 5)}).logits

    with pytest.raises(InputTooLong) as error:
        run(100)
    limit = error.value.limit
    assert limit in (40 - N, 38 - N)
    assert run(limit).isfinite().all()
    with pytest.raises(InputTooLong):
        run(limit + 1)


def test_prompts_stack_and_prefixes_do_not() -> None:
    subject = BY_NAME["llama-gqa"]
    model = grafted(subject, METHODS["prompt"], name="a")
    one = subject.run(model)
    ps.inject(model, METHODS["p-tuning-mlp"], name="b", seed=1)
    assert subject.run(model).shape[1] == LENGTH + 2 * N
    ps.activate(model, "a")
    assert torch.equal(subject.run(model), one)
    ps.inject(model, METHODS["prefix"], name="c")
    with pytest.raises(PlanError, match="one at a time"):
        ps.inject(model, METHODS["prefix"], name="d")
    ps.remove(model, "c")
    ps.remove(model, "b")
    assert torch.equal(subject.run(model), one)


def test_labels_per_token_pass_over_the_prompt() -> None:
    subject = BY_NAME["gpt2"]
    model, call = grafted(subject, METHODS["prompt"]), subject.inputs()
    labels = call["input_ids"].masked_fill(call["attention_mask"] == 0, -100)
    result = model(**call, labels=labels)
    predicting = result.logits[:, N - 1 : -1].flatten(0, 1)  # the last virtual token predicts the first word
    expected = torch.nn.functional.cross_entropy(predicting, labels.flatten())
    assert torch.allclose(result.loss, expected)


@pytest.mark.parametrize("subject", [s for s in SUBJECTS if s.family == "encoder"], ids=str)
def test_a_prefix_is_the_same_with_eager_attention(subject: TokenSubject) -> None:
    model = grafted(subject, METHODS["prefix"])
    before = subject.run(model)
    model.set_attn_implementation("eager")
    assert (subject.run(model) - before).abs().max() <= 1e-5


@pytest.mark.parametrize("subject", [s for s in SUBJECTS if s.family == "encoder"], ids=str)
def test_padding_is_not_seen(subject: TokenSubject) -> None:
    """What stands at a padded position matters to nobody: the prefix moved no mask."""
    for name in ("prompt", "prefix"):
        model, call = grafted(subject, METHODS[name]), subject.inputs()
        with torch.no_grad():
            one = model(**call).logits
            short = model(**{key: value[1:, :-2] for key, value in call.items()}).logits
        assert (one[1:] - short).abs().max() <= 1e-5


@pytest.mark.parametrize("subject", [s for s in SUBJECTS if s.family == "encoder"], ids=str)
def test_a_prefix_survives_gradient_checkpointing(subject: TokenSubject) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = grafted(subject, METHODS["prefix-projected"])
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.train()
        if checkpointing and model.supports_gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**subject.inputs()).logits.pow(2).sum().backward()
        gradients.append([p.grad for p in ps.trainable_parameters(model).values()])
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(*gradients, strict=True))


def test_a_cached_prefix_says_that_checkpointing_loses_it() -> None:
    subject = BY_NAME["llama-gqa"]
    model = grafted(subject, METHODS["prefix"]).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(PlanError, match="checkpointing"):
        model(**subject.inputs())


ENDS = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": PAD, "num_labels": 3}
HEADS = {
    "llama": lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**{**LLAMAS, **ENDS})),
    "gpt2": lambda: tf.GPT2ForSequenceClassification(tf.GPT2Config(**{**GPT2, **ENDS})),
    "opt": lambda: tf.OPTForSequenceClassification(tf.OPTConfig(**{**OPT, **ENDS})),
    "modernbert": lambda: tf.ModernBertForSequenceClassification(
        tf.ModernBertConfig(
            **{**BERTS, **ENDS, "cls_token_id": 3, "sep_token_id": 4}, classifier_pooling="mean"
        )
    ),
}


@pytest.mark.parametrize("method", [METHODS["prompt"], METHODS["prefix"]], ids=lambda method: method.name)
@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_a_head_sees_no_padding(head: str, method: TokenMethod) -> None:
    """The heads that look for words or average over them find the same ones, however far a row is padded."""
    model, call = HEADS[head]().eval(), BY_NAME["bert"].inputs()
    plain = model(**call).logits
    ps.inject(model, method, seed=0, task=FEATURES)
    padded = model(**call).logits
    short = model(**{key: value[1:, :-2] for key, value in call.items()}).logits
    assert (padded[1:] - short).abs().max() <= 1e-5
    assert not torch.equal(padded, plain)
    ps.remove(model)
    assert torch.equal(model(**call).logits, plain)


@pytest.mark.parametrize("method", [METHODS["prompt"], METHODS["prefix"]], ids=lambda method: method.name)
def test_multiple_choice(method: TokenMethod) -> None:
    model = tf.BertForMultipleChoice(tf.BertConfig(**BERTS)).eval()
    call = {key: value[None] for key, value in BY_NAME["bert"].inputs().items()}
    ps.inject(model, method, seed=0, task=FEATURES)
    turned = {key: value.flip(1) for key, value in call.items()}
    with torch.no_grad():
        assert torch.allclose(model(**call).logits.flip(1), model(**turned).logits, atol=1e-6)


@every
def test_half_precision(subject: TokenSubject, method: TokenMethod) -> None:
    model = subject.model().to(torch.bfloat16)
    ps.inject(model, method, seed=0, task=FEATURES)
    result = model(**subject.inputs()).logits
    assert result.dtype is torch.bfloat16
    result.float().sum().backward()
    assert all(
        p.dtype is torch.float32 and p.grad is not None for p in ps.trainable_parameters(model).values()
    )


@pytest.mark.parametrize(
    "method", [METHODS["p-tuning-mlp"], METHODS["prefix-projected"]], ids=lambda m: m.name
)
@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
def test_torch_export(subject: TokenSubject, method: TokenMethod) -> None:
    """A traced model takes batches and lengths of any size, and pays no attention to how many it saw."""

    class Traced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = grafted(subject, method)

        def forward(self, *inputs: Tensor) -> Tensor:
            call = dict(zip(subject.inputs(), inputs, strict=True))
            return self.model(**call, **({} if subject.family == "encoder" else {"use_cache": False})).logits

    traced, call, free = Traced().eval(), subject.inputs(), torch.export.Dim.DYNAMIC
    shapes = ({0: free, 1: free},) * len(call)
    program = torch.export.export(traced, tuple(call.values()), dynamic_shapes=(shapes,), strict=False)
    wider = [torch.cat([value, value[:1]]).repeat(1, 2) for value in call.values()]
    with torch.no_grad():
        assert (program.module()(*wider) - traced(*wider)).abs().max() <= 1e-5


def test_a_start_from_a_text_is_the_words_of_the_text(tmp_path: Path) -> None:
    model = BY_NAME["bert"].model()
    text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "one two"}
    before = snapshot(model)
    with pytest.raises(PlanError, match="tokenizer"):
        ps.inject(model, ps.PromptTuning(N, **text))
    with pytest.raises(PlanError, match="tokenizer"):
        ps.inject(model, ps.PromptTuning(N, **text, tokenizer_name_or_path=str(tmp_path)))
    assert_same(before, model)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\none\ntwo\n")
    tf.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    ps.inject(model, ps.PromptTuning(N, **text, tokenizer_name_or_path=str(tmp_path)), task=FEATURES)
    table = ps.remove(model).shared["prompt_embeddings"]
    ids = tf.BertTokenizer.from_pretrained(tmp_path)("one two")["input_ids"]
    words = model.get_input_embeddings().weight[(ids * N)[:N]]
    assert torch.equal(table, words)


def test_a_model_without_a_place_for_tokens_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    for method in METHODS.values():
        with pytest.raises(PlanError, match="word embeddings"):
            ps.inject(model, method)


def test_a_plan_says_where_the_tokens_enter() -> None:
    model = BY_NAME["llama-gqa"].model()
    assert "model.embed_tokens" in str(ps.plan(model, METHODS["prompt"]))
    assert [site.shape for site in ps.plan(model, METHODS["prefix"]).sites] == [(2, 8)] * 2


@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
@torch.no_grad()
def test_a_hard_prompt_is_the_words_themselves(subject: TokenSubject) -> None:
    """The oracle of prompts: the same words written out in front of the input."""
    words, call = (9, 11, 13), subject.inputs(padded=False)
    model = subject.model()
    written = {**call, "input_ids": torch.cat([torch.tensor([words] * 2), call["input_ids"]], dim=1)}
    written["attention_mask"] = torch.ones_like(written["input_ids"])
    expected = model(**written).logits
    ps.inject(model, ps.HardPrompt(words), task=FEATURES)
    assert not ps.trainable_parameters(model)
    assert (model(**call).logits - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("subject", [s for s in SUBJECTS if s.family == "decoder"], ids=str)
@torch.no_grad()
def test_a_prefix_of_read_words_is_the_words_themselves(subject: TokenSubject) -> None:
    """The oracle of prefixes: keys and values that the model computed from words."""
    words, call, model = torch.tensor([[9, 11, 13]]), subject.inputs(padded=False), subject.model()
    written = torch.cat([words.expand(2, -1), call["input_ids"]], dim=1)
    expected = model(written).logits[:, words.shape[1] :]
    layers = model(words, use_cache=True).past_key_values.layers
    entries = torch.stack([half for layer in layers for half in (layer.keys[0], layer.values[0])])
    plan = ps.plan(model, ps.PrefixTuning(words.shape[1]))
    params = {site.name: {} for site in plan.sites}
    table = entries.permute(2, 0, 1, 3).flatten(1)  # (2L, heads, n, d) → (n, 2L·heads·d)
    ps.inject(model, ps.Adapter(plan, params, shared={"prompt_embeddings": table}))
    assert (model(**call).logits - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("subject", [s for s in SUBJECTS if s.family == "encoder"], ids=str)
@torch.no_grad()
def test_the_words_share_what_the_prefix_leaves_them(subject: TokenSubject) -> None:
    """The oracle of attention surgery: among themselves, words look at one another as they do without it."""
    model, call = subject.model(), subject.inputs()
    model.set_attn_implementation("eager")
    first = N + (PAD + 1 if subject.name in ("roberta", "mpnet") else 0)
    moved = torch.arange(first, first + LENGTH).expand(2, -1)
    if subject.name in ("roberta", "mpnet"):
        moved = moved.masked_fill(call["attention_mask"] == 0, PAD)
    plain = model.base_model(**call, position_ids=moved, output_attentions=True).attentions[0]
    ps.inject(model, METHODS["prefix"], seed=0, task=FEATURES)
    weights = model.base_model(**call, output_attentions=True).attentions[0]
    assert weights.shape[-1] == plain.shape[-1] + N
    assert (weights.sum(-1) - 1).abs().max() <= 1e-5
    words = weights[..., N:]
    seen = call["attention_mask"][:, None, :, None].bool()
    shares = (words / words.sum(-1, keepdim=True)).masked_fill(~seen, 0)
    assert (shares - plain.masked_fill(~seen, 0)).abs().max() <= 1e-5
    assert (weights[..., :N] > 0).all()


@every
def test_too_many_virtual_tokens(subject: TokenSubject, method: TokenMethod) -> None:
    model = subject.model()
    before = snapshot(model)
    many = dataclasses.replace(method, num_virtual_tokens=40)
    if subject.name in ("llama-gqa", "qwen2", "t5", "modernbert", "deberta-v2"):
        ps.plan(model, many)  # their positions are computed, or relative
    else:
        with pytest.raises(PlanError, match="room for words"):
            ps.inject(model, many)
    with pytest.raises(PlanError, match="cannot name"):
        ps.inject(model, method, name="weight")
    assert_same(before, model)


@every
def test_a_head_trains_beside(subject: TokenSubject, method: TokenMethod) -> None:
    model = subject.model().train()
    before, heads = snapshot(model), subject.family == "encoder"
    ps.inject(model, method, seed=0)
    names = list(ps.trainable_parameters(model))
    assert any("classifier" in name for name in names) == heads
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    model(**subject.inputs()).logits.pow(2).sum().backward()
    optimiser.step()
    adapter = ps.remove(model)
    assert bool(adapter.replaced) == heads
    assert_same(before, model)
    again = ps.inject(subject.model(), adapter)
    assert ps.remove(again) == adapter


@pytest.mark.parametrize(
    "method", [ps.PromptTuning(num_virtual_tokens=2), ps.PrefixTuning(num_virtual_tokens=2)]
)
@pytest.mark.parametrize(
    "name", ["ViTForImageClassification", "CLIPTextModel", "SwinForImageClassification", "SiglipVisionModel"]
)
def test_virtual_tokens_have_no_place_where_no_embeddings_go_in(name: str, method: ps.Method) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    image = {"image_size": 8, "patch_size": 4}
    words = {"image_size": 32, "embed_dim": 16, "depths": [1], "num_heads": [2]} if "Swin" in name else sizes
    model = transformer(name, words if "Swin" in name or "Text" in name else {**sizes, **image})
    with pytest.raises(PlanError, match="takes no embeddings in the place of words"):
        ps.plan(model, method)
