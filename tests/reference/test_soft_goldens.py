"""PEFT's own encoders, files and outputs of soft prompts: the same bits, read and written both ways."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peftsurgery as ps
from fixtures.minilm import minilm_path
from peftsurgery.disk import peft as files
from peftsurgery.method import TABLE, TokenMethod
from peftsurgery.site import Kind, Layout, Site

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

FIXTURES = Path(__file__).parents[2] / "fixtures"
RAW = "prompt_encoder_raw.safetensors"
SOFT = ("minilm_prompt", "minilm_prefix", "minilm_ptuning_mlp", "stories260k_prefix_proj")
TOKENS = torch.arange(12).reshape(2, 6)
WORDS = (Site("words", Kind.TOKENS, (20, 16), Layout.IN_OUT),)


@pytest.mark.parametrize("name", ["minilm_ptuning_mlp", "stories260k_prefix_proj"])
def test_a_raw_encoder_bakes_to_the_table_that_peft_stored(name: str, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / name, tmp_path / "whole")
    (tmp_path / "whole" / RAW).rename(tmp_path / "whole" / files.ENCODER)
    whole = ps.load_adapter(tmp_path / "whole")
    assert whole.shared.keys() == load_file(FIXTURES / name / RAW).keys()
    baked = ps.bake(whole)
    assert isinstance(baked, ps.Adapter)
    assert torch.equal(baked.shared[TABLE], load_file(FIXTURES / name / files.TENSORS)[TABLE])
    assert baked == ps.load_adapter(FIXTURES / name)


def test_a_prefix_is_laid_out_as_peft_lays_it_out() -> None:
    adapter = ps.load_adapter(FIXTURES / "stories260k_prefix_proj")
    golden = np.load(FIXTURES / "stories260k_prefix_proj" / "golden.npz")
    heads, head_dim = adapter.plan.sites[0].shape
    flat = adapter.shared[TABLE].view(12, 2 * len(adapter.plan.sites), heads, head_dim).permute(1, 2, 0, 3)
    assert torch.equal(flat[0::2], torch.from_numpy(golden["prefix_keys"][:, 0]))
    assert torch.equal(flat[1::2], torch.from_numpy(golden["prefix_values"][:, 0]))


@pytest.mark.parametrize("name", SOFT)
def test_peft_reproduces_its_outputs_from_what_we_write(name: str, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / name, tmp_path / "whole")
    if (tmp_path / "whole" / RAW).exists():
        (tmp_path / "whole" / RAW).rename(tmp_path / "whole" / files.ENCODER)
    ps.save_adapter(ps.load_adapter(tmp_path / "whole"), tmp_path / "written")
    ps.bake(tmp_path / "written", out=tmp_path / "baked")
    golden = np.load(FIXTURES / name / "golden.npz")
    words = [word for word in ("input_ids", "attention_mask", "token_type_ids") if word in golden]
    for folder in ("written", "baked"):
        model = peft.PeftModel.from_pretrained(base_of(name), tmp_path / folder).eval()
        with torch.no_grad():
            logits = model(**{word: torch.from_numpy(golden[word]) for word in words}).logits
        gap = (logits - torch.from_numpy(golden["logits"])).abs()
        kept = torch.from_numpy(golden["attention_mask"]).bool()
        assert (gap if gap.ndim == 2 else gap[kept]).max() <= 1e-5


def base_of(name: str) -> nn.Module:
    if name.startswith("minilm"):
        return transformers.AutoModelForSequenceClassification.from_pretrained(minilm_path(), num_labels=2)
    return transformers.AutoModelForCausalLM.from_pretrained(FIXTURES / "stories260k")


ENCODERS: list[tuple[TokenMethod, dict[str, Any]]] = [
    (ps.PTuning(5), {"encoder_hidden_size": 16}),
    (ps.PTuning(5, encoder_hidden_size=7), {"encoder_hidden_size": 7}),
    (ps.PTuning(4, encoder_hidden_size=7, num_transformer_submodules=2), {"encoder_hidden_size": 7}),
    (ps.PTuning(5, "LSTM"), {"encoder_hidden_size": 16}),
    (ps.PTuning(5, "LSTM", 6, encoder_num_layers=3, encoder_dropout=0.5), {"encoder_hidden_size": 6}),
    (ps.PTuning(5, "LSTM", 6, encoder_num_layers=1), {"encoder_hidden_size": 6}),
]


@pytest.mark.parametrize(("soft", "sizes"), ENCODERS, ids=lambda value: repr(value))
def test_p_tuning_is_pefts_encoder(soft: ps.PTuning, sizes: dict[str, int]) -> None:
    config = peft.PromptEncoderConfig(
        num_virtual_tokens=soft.num_virtual_tokens,
        token_dim=16,
        num_transformer_submodules=soft.num_transformer_submodules,
        encoder_reparameterization_type=soft.encoder_reparameterization_type,
        encoder_num_layers=soft.encoder_num_layers,
        encoder_dropout=soft.encoder_dropout,
        **sizes,
    )
    torch.manual_seed(0)
    encoder = peft.PromptEncoder(config).eval()
    expect_same(soft, WORDS, encoder)


@pytest.mark.parametrize(
    "soft",
    [
        ps.PrefixTuning(5),
        ps.PrefixTuning(5, prefix_projection=True),
        ps.PrefixTuning(5, prefix_projection=True, encoder_hidden_size=9),
        ps.PrefixTuning(5, prefix_projection=True, init_weights="zero"),
    ],
    ids=repr,
)
def test_prefix_tuning_is_pefts_encoder(soft: ps.PrefixTuning) -> None:
    sites = [Site(f"{layer}", Kind.ATTENTION, (2, 4)) for layer in range(3)]
    config = peft.PrefixTuningConfig(
        num_virtual_tokens=soft.num_virtual_tokens,
        token_dim=8,
        num_layers=3,
        num_attention_heads=2,
        prefix_projection=soft.prefix_projection,
        encoder_hidden_size=soft.encoder_hidden_size or 8,
        init_weights=soft.init_weights,
    )
    torch.manual_seed(0)
    encoder = peft.PrefixEncoder(config).eval()
    expect_same(soft, sites, encoder)
    if soft.init_weights == "zero":
        assert not soft.tokens(soft.init_shared(sites)).any()


def expect_same(soft: TokenMethod, sites: Any, encoder: nn.Module) -> None:
    """The parameters have PEFT's names and shapes, and the tokens and gradients PEFT's bits."""
    state = dict(encoder.named_parameters())
    if soft.shared_shapes(sites).keys() == {TABLE}:
        state = {TABLE: state["embedding.weight"]}
    assert {name: tuple(p.shape) for name, p in state.items()} == soft.shared_shapes(sites)
    count = state.get("embedding.weight", state.get(TABLE)).shape[0]
    theirs, ours = encoder(torch.arange(count)[None])[0], soft.tokens(state)
    assert torch.equal(ours, theirs)
    _, table = soft.bake({name: p.detach() for name, p in state.items()})
    assert torch.equal(table[TABLE], theirs)
    for mine, its in zip(gradients(ours, state), gradients(theirs, state), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-6, atol=1e-7)


def gradients(tokens: torch.Tensor, state: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(tokens.pow(2).sum(), list(state.values()))


@pytest.mark.parametrize("method", [ps.PTuning(300), ps.PTuning(300, "LSTM"), ps.PrefixTuning(300, True)])
def test_fresh_parameters_are_distributed_as_pefts(method: TokenMethod) -> None:
    sites = WORDS if Kind.TOKENS in method.kinds else [Site("a", Kind.ATTENTION, (2, 8))]
    if isinstance(method, ps.PTuning):
        kind, more = peft.PromptEncoderConfig, {"num_transformer_submodules": 1}
        more["encoder_reparameterization_type"] = method.encoder_reparameterization_type
    else:
        kind, more = peft.PrefixTuningConfig, {"num_layers": 1, "prefix_projection": True}
    config = kind(num_virtual_tokens=300, token_dim=16, encoder_hidden_size=16, **more)
    theirs = (peft.PromptEncoder if isinstance(method, ps.PTuning) else peft.PrefixEncoder)(config)
    ours = method.init_shared(sites, torch.Generator().manual_seed(0))
    for name, p in theirs.named_parameters():
        if name == "embedding.weight":
            assert abs(float(ours[name].std()) - float(p.std())) < 0.05
        elif p.numel() > 200:
            assert abs(float(ours[name].abs().max() / p.abs().max()) - 1) < 0.05, name


def test_a_text_fills_the_table_as_pefts(tmp_path: Path) -> None:
    words = nn.Embedding(30522, 16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_path())
    for count in (3, 20):
        text = {
            "prompt_tuning_init": "TEXT",
            "prompt_tuning_init_text": "Is this sentence a complaint?",
            "tokenizer_name_or_path": str(minilm_path()),
        }
        config = peft.PromptTuningConfig(
            num_virtual_tokens=count, token_dim=16, num_transformer_submodules=1, **text
        )
        theirs = peft.PromptEmbedding(config, words).embedding.weight
        soft = ps.PromptTuning(count, **text)
        ids = tokenizer(soft.start_text)["input_ids"]
        assert torch.equal(soft.init_shared(WORDS, None, words.weight, ids)[TABLE], theirs)


def bert() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 3}
    config = transformers.BertConfig(vocab_size=20, num_labels=3, **sizes)
    return transformers.BertForSequenceClassification(config)


def distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(vocab_size=20, dim=16, hidden_dim=24, n_heads=2, n_layers=1)
    return transformers.DistilBertForSequenceClassification(config)


def llama() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_hidden_layers": 3}
    config = transformers.LlamaConfig(
        vocab_size=20, num_key_value_heads=2, bos_token_id=0, eos_token_id=1, **sizes
    )
    return transformers.LlamaForCausalLM(config)


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=20, decoder_start_token_id=0, **sizes)
    )


PROMPT = {"token_dim": 16, "num_attention_heads": 2, "num_layers": 1}
"""What PEFT cannot find out about DistilBERT."""
CASES: dict[str, tuple[Callable[[], nn.Module], str, type, dict[str, Any]]] = {
    "bert prompt": (bert, "SEQ_CLS", peft.PromptTuningConfig, {}),
    "bert p-tuning": (bert, "SEQ_CLS", peft.PromptEncoderConfig, {"encoder_hidden_size": 7}),
    "bert p-tuning lstm": (
        bert,
        "SEQ_CLS",
        peft.PromptEncoderConfig,
        {"encoder_reparameterization_type": "LSTM", "encoder_dropout": 0.1},
    ),
    "bert prefix": (bert, "SEQ_CLS", peft.PrefixTuningConfig, {}),
    "bert prefix projected": (bert, "SEQ_CLS", peft.PrefixTuningConfig, {"prefix_projection": True}),
    "distilbert prompt": (distilbert, "SEQ_CLS", peft.PromptTuningConfig, PROMPT),
    "llama prompt": (llama, "CAUSAL_LM", peft.PromptTuningConfig, {"prompt_tuning_init": "SAMPLE_VOCAB"}),
    "llama prefix": (llama, "CAUSAL_LM", peft.PrefixTuningConfig, {"init_weights": "zero"}),
    "llama prefix projected": (llama, "CAUSAL_LM", peft.PrefixTuningConfig, {"prefix_projection": True}),
    "t5 prompt": (t5, "SEQ_2_SEQ_LM", peft.PromptTuningConfig, {}),
    "t5 p-tuning": (t5, "SEQ_2_SEQ_LM", peft.PromptEncoderConfig, {}),
    "t5 prefix": (t5, "SEQ_2_SEQ_LM", peft.PrefixTuningConfig, {}),
}


@pytest.fixture(params=CASES, scope="module")
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A base, PEFT's model on a copy of it with every trainable tensor moved, and what PEFT saved of it."""
    make, task, config, options = CASES[request.param]
    torch.manual_seed(0)
    base = make().eval()
    model = peft.get_peft_model(copy.deepcopy(base), config(task_type=task, num_virtual_tokens=4, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.5)
    directory = tmp_path_factory.mktemp("peft")
    model.eval().save_pretrained(directory)
    return base, model, directory


def output(model: nn.Module) -> torch.Tensor:
    more = {"decoder_input_ids": TOKENS[:, :3]} if "T5" in type(model.base_model).__name__ else {}
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), **more).logits
    return found


def test_what_peft_saved_we_read_and_write_back(saved: Any, tmp_path: Path) -> None:
    base, model, directory = saved
    adapter = ps.load_adapter(directory)
    tensors = load_file(directory / files.TENSORS)
    assert torch.equal(adapter.shared[TABLE], tensors.pop(TABLE))
    assert {f"base_model.{name}" for name in adapter.replaced} == tensors.keys()
    ps.save_adapter(adapter, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again").eval()
    expected = output(model)
    assert expected.abs().max() > 0.05
    torch.testing.assert_close(output(again), expected, rtol=0, atol=1e-6)


WITH_ENCODER = [name for name in CASES if "p-tuning" in name or "projected" in name]


@pytest.mark.parametrize("saved", WITH_ENCODER, indirect=True)
def test_an_encoder_beside_is_passed_over_by_peft(saved: Any, tmp_path: Path) -> None:
    base, model, directory = saved
    shutil.copytree(directory, tmp_path / "whole")
    encoder = {name: p.detach() for name, p in model.prompt_encoder["default"].named_parameters()}
    save_file(encoder, tmp_path / "whole" / files.ENCODER)
    whole = ps.load_adapter(tmp_path / "whole")
    assert whole.shared.keys() == encoder.keys()
    assert ps.bake(whole) == ps.load_adapter(directory)
    ps.save_adapter(whole, tmp_path / "again")
    assert load_file(tmp_path / "again" / files.ENCODER).keys() == encoder.keys()
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again").eval()
    torch.testing.assert_close(output(again), output(model), rtol=0, atol=1e-6)


def test_the_configuration_says_what_pefts_says(saved: Any, tmp_path: Path) -> None:
    _, _, directory = saved
    adapter = ps.load_adapter(directory)
    ps.save_adapter(adapter, tmp_path / "again")
    said, theirs = (json.loads((d / files.CONFIG).read_text()) for d in (tmp_path / "again", directory))
    told = {"modules_to_save"}  # PEFT repeats names in it
    if adapter.plan.sites[0].kind is Kind.TOKENS:
        told |= {"num_layers", "num_attention_heads"}  # sizes that mean nothing to embeddings
    if theirs["peft_type"] == "P_TUNING":
        told |= {"peft_type", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path"}
    if theirs.get("prefix_projection"):
        told |= {"prefix_projection", "encoder_hidden_size"}
    assert {key for key in said if said[key] != theirs.get(key)} <= told
    assert set(said["modules_to_save"] or ()) == set(theirs["modules_to_save"] or ())
