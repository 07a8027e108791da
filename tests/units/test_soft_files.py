"""The files of soft prompts, whole and spoilt, and `bake` on the command line and in Python."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import peftsurgery as ps
from peftsurgery.cli import main
from peftsurgery.disk import peft as files
from peftsurgery.errors import (
    AdapterError,
    MismatchedTensors,
    NonFiniteWeight,
    NotFoldable,
    PlanError,
    TruncatedShard,
    UnknownMethod,
    UnsupportedSite,
    UntrustedPickle,
)
from peftsurgery.method import TABLE
from peftsurgery.site import Kind, Site
from tests.soft import LAYERS, TEXT, WORDS, trained, vocabulary

FIXTURES = Path(__file__).parents[2] / "fixtures"
RAW = "prompt_encoder_raw.safetensors"
Change = Callable[[dict[str, Tensor]], object]


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    """Makes a copy of a real adapter, with its encoder beside where it has one, to be spoilt."""

    def made(name: str) -> Path:
        directory = tmp_path / "adapter"
        shutil.copytree(FIXTURES / name, directory)
        if (directory / RAW).exists():
            (directory / RAW).rename(directory / files.ENCODER)
        return directory

    return made


def reconfigure(directory: Path, **changes: Any) -> Path:
    path = directory / files.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory


def retensor(file: Path, change: Change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def configuration(adapter: ps.Adapter, directory: Path) -> dict[str, Any]:
    ps.save_adapter(adapter, directory)
    found: dict[str, Any] = json.loads((directory / files.CONFIG).read_text())
    return found


@pytest.mark.parametrize(
    ("name", "method", "heads"),
    [
        ("minilm_prompt", ps.PromptTuning, 2),
        ("minilm_ptuning_mlp", ps.PromptTuning, 2),
        ("minilm_prefix", ps.PrefixTuning, 2),
        ("stories260k_prefix_proj", ps.PrefixTuning, 0),
    ],
)
def test_real_adapters_are_read(name: str, method: type, heads: int) -> None:
    adapter = ps.load_adapter(FIXTURES / name)
    stored = load_file(FIXTURES / name / files.TENSORS)
    assert {type(step.method) for step in adapter.plan.steps} == {method}
    assert torch.equal(adapter.shared[TABLE], stored.pop(TABLE))
    assert {f"base_model.{n}": t.tolist() for n, t in adapter.replaced.items()} == {
        n: t.tolist() for n, t in stored.items()
    }
    assert len(stored) == heads


def test_what_is_written_of_a_prompt(tmp_path: Path) -> None:
    soft = ps.PromptTuning(5, prompt_tuning_init="TEXT", **TEXT)
    assert configuration(trained(soft), tmp_path / "a") == {
        "base_model_name_or_path": "org/base",
        "inference_mode": True,
        "modules_to_save": ["classifier"],
        "num_attention_heads": 1,
        "num_layers": 1,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": 5,
        "peft_type": "PROMPT_TUNING",
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "is it a complaint",
        "task_type": "SEQ_CLS",
        "token_dim": 24,
        "tokenizer_name_or_path": "org/tokenizer",
    }
    keys = {"base_model.classifier.bias", "base_model.classifier.weight", TABLE}
    with safe_open(tmp_path / "a" / files.TENSORS, "pt") as stored:
        assert set(stored.keys()) == keys and stored.metadata() == {"format": "pt"}


def test_what_is_written_of_a_prefix(tmp_path: Path) -> None:
    soft = ps.PrefixTuning(5, prefix_projection=True, encoder_hidden_size=9)
    said = configuration(replace(trained(soft, head=False), task_type="SEQ_2_SEQ_LM"), tmp_path / "a")
    sizes = {"token_dim": 8, "num_layers": 3, "num_attention_heads": 2, "num_transformer_submodules": 2}
    rest = {"prefix_projection": True, "encoder_hidden_size": 9, "modules_to_save": None}
    assert said.items() >= {**sizes, **rest, "peft_type": "PREFIX_TUNING"}.items()
    assert load_file(tmp_path / "a" / files.TENSORS).keys() == {TABLE}
    assert load_file(tmp_path / "a" / files.ENCODER).keys() == soft.shared_shapes(LAYERS).keys()


def test_what_is_written_of_p_tuning(tmp_path: Path) -> None:
    said = configuration(trained(ps.PTuning(4, "LSTM", 6, encoder_dropout=0.25)), tmp_path / "a")
    rest = {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 6, "encoder_num_layers": 2}
    assert said.items() >= {**rest, "encoder_dropout": 0.25, "peft_type": "P_TUNING"}.items()


def test_a_text_whose_tokenizer_was_not_named_gets_the_base(tmp_path: Path) -> None:
    soft = ps.PromptTuning(5, prompt_tuning_init="TEXT", prompt_tuning_init_text="hello")
    assert configuration(trained(soft), tmp_path / "a")["tokenizer_name_or_path"] == "org/base"


def test_a_hard_prompt_is_a_table(tmp_path: Path) -> None:
    adapter = trained(ps.HardPrompt((7, 2, 7)))
    said = configuration(adapter, tmp_path / "a")
    assert (
        said.items() >= {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}.items() and "ids" not in said
    )
    assert torch.equal(ps.load_adapter(tmp_path / "a").shared[TABLE], adapter.shared[TABLE])


def test_an_idle_text_is_passed_over(copy: Callable[[str], Path]) -> None:
    directory = reconfigure(copy("minilm_prompt"), prompt_tuning_init="RANDOM", tokenizer_kwargs={"a": 1})
    method = ps.load_adapter(directory).plan.steps[0].method
    assert isinstance(method, ps.PromptTuning) and method.start_text is None


@pytest.mark.parametrize(
    ("name", "changes", "error", "said"),
    [
        ("minilm_prompt", {"num_virtual_tokens": 21}, MismatchedTensors, r"\(20, 384\).*takes \(21, 384\)"),
        ("minilm_prompt", {"num_virtual_tokens": 0}, AdapterError, "num_virtual_tokens is 0"),
        ("minilm_prompt", {"num_virtual_tokens": "20"}, AdapterError, "'20'"),
        ("minilm_prompt", {"num_virtual_tokens": True}, AdapterError, "is True"),
        ("minilm_prompt", {"num_transformer_submodules": 2}, MismatchedTensors, r"takes \(40, 384\)"),
        ("minilm_prompt", {"token_dim": 385}, MismatchedTensors, r"takes \(20, 385\)"),
        ("minilm_prompt", {"token_dim": "x"}, AdapterError, "`token_dim` is 'x'"),
        ("minilm_prompt", {"prompt_tuning_init": "GUESS"}, AdapterError, "'GUESS'"),
        ("minilm_prompt", {"prompt_tuning_init_text": None}, AdapterError, "go together"),
        ("minilm_prompt", {"modules_to_save": None}, MismatchedTensors, "does not announce"),
        ("minilm_prompt", {"modules_to_save": "classifier"}, AdapterError, "`modules_to_save`"),
        ("minilm_prompt", {"an_option_of_tomorrow": 3}, UnknownMethod, "`an_option_of_tomorrow`"),
        ("minilm_prompt", {"peft_type": "CPT"}, UnknownMethod, "'CPT'"),
        ("minilm_prefix", {"num_layers": 7}, MismatchedTensors, "384 numbers for 7 layers"),
        ("minilm_prefix", {"num_layers": None}, AdapterError, "`num_layers` is None"),
        ("minilm_prefix", {"num_layers": 10**12}, MismatchedTensors, "layers"),
        ("minilm_prefix", {"num_attention_heads": 5}, AdapterError, "share evenly"),
        ("minilm_prefix", {"num_attention_heads": 0}, AdapterError, "`num_attention_heads` is 0"),
        ("minilm_prefix", {"init_weights": "one"}, AdapterError, "'one'"),
        ("minilm_ptuning_mlp", {"encoder_hidden_size": 64}, MismatchedTensors, "mlp_head.0.weight"),
        ("minilm_ptuning_mlp", {"encoder_reparameterization_type": "LSTM"}, MismatchedTensors, "lstm_head"),
        ("minilm_ptuning_mlp", {"encoder_reparameterization_type": "CNN"}, AdapterError, "'CNN'"),
        ("minilm_ptuning_mlp", {"encoder_dropout": 1.0}, AdapterError, "encoder_dropout"),
        ("minilm_ptuning_mlp", {"peft_type": "PROMPT_TUNING"}, UnknownMethod, "encoder_"),
        ("stories260k_prefix_proj", {"prefix_projection": False}, MismatchedTensors, "that has none"),
        ("stories260k_prefix_proj", {"prefix_projection": 1}, AdapterError, "`prefix_projection`"),
    ],
)
def test_a_spoilt_configuration_is_refused(
    copy: Callable[[str], Path], name: str, changes: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        ps.load_adapter(reconfigure(copy(name), **changes))


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda t: t.pop(TABLE), MismatchedTensors, "lacks 'prompt_embeddings'"),
        (lambda t: t.update(more=torch.ones(2)), MismatchedTensors, "holds 'more'"),
        (lambda t: t.update({TABLE: t[TABLE].flatten()}), MismatchedTensors, "two dimensions"),
        (lambda t: t.update({TABLE: t[TABLE][:, :-1].contiguous()}), MismatchedTensors, "383"),
        (lambda t: t[TABLE].__setitem__((0, 0), float("nan")), NonFiniteWeight, "prompt_embeddings"),
        (lambda t: t["base_model.classifier.bias"].fill_(float("inf")), NonFiniteWeight, "classifier"),
        (lambda t: t.update({TABLE: t[TABLE].to(torch.int8)}), MismatchedTensors, "int8"),
    ],
)
def test_spoilt_tensors_are_refused(
    copy: Callable[[str], Path], change: Change, error: type[Exception], said: str
) -> None:
    directory = copy("minilm_prompt")
    retensor(directory / files.TENSORS, change)
    with pytest.raises(error, match=said):
        ps.load_adapter(directory)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda t: t["mlp_head.2.bias"].add_(0.5), MismatchedTensors, "does not give its"),
        (lambda t: t.pop("mlp_head.2.bias"), MismatchedTensors, "the adapter lacks .*mlp_head"),
        (lambda t: t.update(extra=torch.ones(1)), MismatchedTensors, "the adapter holds .extra. besides"),
        (lambda t: t.update({"mlp_head.2.bias": torch.ones(3)}), MismatchedTensors, r"has shape \(3,\)"),
        (lambda t: t["mlp_head.2.bias"].fill_(float("nan")), NonFiniteWeight, "mlp_head.2.bias"),
    ],
)
def test_an_encoder_that_does_not_fit_is_refused(
    copy: Callable[[str], Path], change: Change, error: type[Exception], said: str
) -> None:
    directory = copy("minilm_ptuning_mlp")
    assert isinstance(ps.load_adapter(directory).plan.steps[0].method, ps.PTuning)
    retensor(directory / files.ENCODER, change)
    with pytest.raises(error, match=said):
        ps.load_adapter(directory)


def test_a_rounded_table_still_fits_its_encoder(copy: Callable[[str], Path]) -> None:
    directory = copy("minilm_ptuning_mlp")
    retensor(directory / files.TENSORS, lambda t: t[TABLE].mul_(1 + 1e-6))
    assert isinstance(ps.load_adapter(directory).plan.steps[0].method, ps.PTuning)


def test_a_torn_encoder_is_refused(copy: Callable[[str], Path]) -> None:
    directory = copy("minilm_ptuning_mlp")
    file = directory / files.ENCODER
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(TruncatedShard):
        ps.load_adapter(directory)


def test_a_pickle_is_read_only_when_asked(copy: Callable[[str], Path]) -> None:
    directory = copy("minilm_prompt")
    whole = ps.load_adapter(directory)
    torch.save(load_file(directory / files.TENSORS), directory / files.PICKLE)
    (directory / files.TENSORS).unlink()
    with pytest.raises(UntrustedPickle):
        ps.load_adapter(directory)
    assert ps.load_adapter(directory, allow_pickle=True) == whole


def test_what_the_format_cannot_say_is_refused(tmp_path: Path) -> None:
    adapter = trained(ps.PromptTuning(5))
    line = Site("a.q", Kind.LINEAR, (6, 4))
    lora = ps.LoRA(r=2)
    mixed = replace(
        adapter,
        plan=ps.Plan((*adapter.plan.steps, ps.Step(line, lora))),
        params={**adapter.params, "a.q": lora.init(line, None)},
    )
    biased = replace(adapter, plan=replace(adapter.plan, bias="all"))
    blank = replace(adapter, shared={TABLE: torch.empty(5, 24, device="meta")})
    for spoilt, said in ((mixed, "two adapters"), (biased, "bias is 'all'"), (blank, "meta device")):
        with pytest.raises(AdapterError, match=said):
            ps.save_adapter(spoilt, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ps.PromptTuning(0), "num_virtual_tokens is 0"),
        (lambda: ps.PromptTuning(2.5), "2.5"),
        (lambda: ps.PromptTuning(prompt_tuning_init="TEXT"), "go together"),
        (lambda: ps.PromptTuning(num_transformer_submodules=0), "num_transformer_submodules"),
        (lambda: ps.PTuning(encoder_hidden_size=0), "encoder_hidden_size is 0"),
        (lambda: ps.PTuning(encoder_num_layers=0), "encoder_num_layers is 0"),
        (lambda: ps.PrefixTuning(encoder_hidden_size=-1), "encoder_hidden_size is -1"),
        (lambda: ps.HardPrompt(()), "a text or its token ids"),
    ],
)
def test_a_hyper_parameter_out_of_range_is_refused(make: Callable[[], object], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        make()


def test_a_start_from_words_takes_their_rows() -> None:
    table = vocabulary()
    soft = ps.PromptTuning(5, prompt_tuning_init="TEXT", prompt_tuning_init_text="a b")
    assert torch.equal(soft.init_shared(WORDS, None, table, (3, 5))[TABLE], table[[3, 5, 3, 5, 3]])
    assert torch.equal(soft.init_shared(WORDS, None, table, range(9))[TABLE], table[:5])
    sampled = ps.PromptTuning(5, prompt_tuning_init="SAMPLE_VOCAB").init_shared(WORDS, None, table)[TABLE]
    assert all(any(torch.equal(row, word) for word in table) for row in sampled)
    hard = ps.HardPrompt((7, 2)).init_shared(WORDS, None, table.bfloat16())[TABLE]
    assert torch.equal(hard, table.bfloat16()[[7, 2]].float())


@pytest.mark.parametrize(
    ("soft", "table", "ids", "said"),
    [
        (ps.PromptTuning(5, prompt_tuning_init="TEXT", **TEXT), None, (1,), "weights are loaded"),
        (ps.PromptTuning(5, prompt_tuning_init="TEXT", **TEXT), vocabulary(), (), "no token"),
        (ps.PromptTuning(5, prompt_tuning_init="TEXT", **TEXT), vocabulary(), (67,), "The token 67"),
        (ps.PromptTuning(5, prompt_tuning_init="SAMPLE_VOCAB"), None, (), "weights are loaded"),
        (ps.HardPrompt((1,)), None, (), "weights are loaded"),
        (ps.HardPrompt((-1,)), vocabulary(), (), "The token -1"),
    ],
)
def test_a_start_that_lacks_something_is_refused(soft: Any, table: Any, ids: Any, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        soft.init_shared(WORDS, None, table, ids)


def test_layers_that_differ_take_no_prefix() -> None:
    with pytest.raises(UnsupportedSite, match="layers that are alike"):
        ps.PrefixTuning(5).shared_shapes([LAYERS[0], replace(LAYERS[1], shape=(4, 4))])


def test_shared_parameters_are_checked() -> None:
    adapter = trained(ps.PTuning(5))
    for shared in ({}, {**adapter.shared, "more": torch.ones(1)}, {TABLE: torch.ones(5, 24)}):
        with pytest.raises(MismatchedTensors):
            ps.save_adapter(replace(adapter, shared=shared), "nowhere")


def bake(*words: object) -> Any:
    return CliRunner().invoke(main, ["bake", *map(str, words)])


def test_bake_on_the_command_line(copy: Callable[[str], Path], tmp_path: Path) -> None:
    directory = copy("stories260k_prefix_proj")
    done = bake(directory, "-o", tmp_path / "out", "--base", FIXTURES / "stories260k", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report.items() >= {"tokens": "12 × 320", "parameters": 3840, "parameters_before": 23296}.items()
    made, stored = ps.load_adapter(tmp_path / "out"), load_file(directory / files.TENSORS)[TABLE]
    assert made.base == str(FIXTURES / "stories260k")
    assert torch.equal(made.shared[TABLE], stored)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [files.CONFIG, files.TENSORS]
    again = bake(tmp_path / "out", "-o", tmp_path / "twice")
    assert again.exit_code == 0 and "nothing to bake" in again.stdout
    assert (tmp_path / "twice" / files.TENSORS).read_bytes() == (
        tmp_path / "out" / files.TENSORS
    ).read_bytes()


def test_bake_refuses(copy: Callable[[str], Path], tmp_path: Path) -> None:
    directory = copy("minilm_prefix")
    with pytest.raises(PlanError, match="-o OUT"):
        ps.bake(directory)
    other = bake(directory, "-o", tmp_path / "out", "--base", FIXTURES / "stories260k")
    assert other.exit_code == 1 and not (tmp_path / "out").exists(), other.output
    full = bake(directory, "-o", directory)
    assert full.exit_code == 1 and "is not empty" in full.stderr


def test_a_soft_prompt_is_not_merged(tmp_path: Path) -> None:
    with pytest.raises(NotFoldable, match="export-onnx"):
        ps.merge(FIXTURES / "stories260k", FIXTURES / "stories260k_prefix_proj", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
