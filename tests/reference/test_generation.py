"""What an exported decoder writes is what PEFT's `generate` writes, whatever the adapter and wherever its prefix is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

import peftsurgery as ps
from peftsurgery.errors import AdapterError, ExportError, PlanError
from peftsurgery.graph.generation import Decoder
from peftsurgery.graph.prefixes import Prefix
from peftsurgery.graph.sampling import Sampling, pick

FIXTURES = Path(__file__).parents[2] / "fixtures"
STORIES = FIXTURES / "stories260k"


def read(directory: Path) -> Prefix | None:
    file = directory / "prefix.safetensors"
    return load_file(file) if file.is_file() else None


def peft_writes(config: peft.PeftConfig, directory: Path, rows: list[list[int]]) -> list[list[int]]:
    """PEFT's greedy text with a fresh adapter, which it saves in `directory`; row by row, without padding."""
    torch.manual_seed(3)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(STORIES), config)
    for name, parameter in model.named_parameters():
        if "prompt_encoder" in name:
            parameter.data.normal_(0, 0.4)
    model.save_pretrained(directory)
    model.eval()
    written = []
    for row in rows:
        given = torch.tensor([row])
        with torch.no_grad():
            tokens = model.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=16,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        written.append(tokens[0, len(row) :].tolist())
    return written


SOFT = {
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7),
    "p-tuning": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=16),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6),
}


def test_every_soft_prompt_serves_from_one_graph_in_one_batch(tmp_path: Path) -> None:
    rows = [[1, 403, 407, 261, 378], [1, 291, 280], [1, 385, 328, 432, 317, 286, 261], [1, 265, 268]]
    expected, prefixes = [], []
    for (name, config), row in zip(SOFT.items(), rows, strict=False):
        expected += peft_writes(config, tmp_path / name, [row])
        ps.export_onnx(STORIES, adapters=tmp_path / name, out=tmp_path / f"{name} baked", verify=False)
        assert Decoder(tmp_path / f"{name} baked").generate([row], Sampling(16)) == expected[-1:]
        ps.export_onnx(
            STORIES,
            adapters=tmp_path / name,
            out=tmp_path / f"{name} file",
            prefix="file",
            weights="reference",
        )
        prefixes.append(read(tmp_path / f"{name} file"))
    ps.export_onnx(STORIES, out=tmp_path / "base", weights="reference")
    base = Decoder(tmp_path / "base")
    expected += base.generate(rows[3:], Sampling(16))
    assert base.generate(rows, Sampling(16), prefixes=[*prefixes, None]) == expected
    same = {(tmp_path / f"{name} file" / "model.onnx").read_bytes() for name in SOFT}
    assert same == {(tmp_path / "base" / "model.onnx").read_bytes()}, "one graph for every soft prompt"


SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "vocab_size": 101,
    "max_position_embeddings": 80,
    "n_positions": 80,
    "intermediate_size": 48,
    "pad_token_id": 0,
}


METHODS = (ps.PromptTuning(num_virtual_tokens=5), ps.PrefixTuning(num_virtual_tokens=4))


@pytest.mark.parametrize(
    "architecture", ["GPT2LMHeadModel", "OPTForCausalLM", "BloomForCausalLM", "Gemma3ForCausalLM"]
)
@pytest.mark.parametrize(
    "method",
    [ps.PromptTuning(num_virtual_tokens=5), ps.PrefixTuning(num_virtual_tokens=4)],
    ids=["prompt", "prefix"],
)
def test_a_baked_prefix_is_the_grafted_model_on_other_architectures(
    architecture: str, method: ps.PromptTuning, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    cls = getattr(transformers, architecture)
    own = {"num_key_value_heads": 2, "head_dim": 8} if "Gemma" in architecture else {}
    own |= {"word_embed_proj_dim": 32} if "OPT" in architecture else {}
    model = cls(cls.config_class(**SMALL, **own)).eval()
    ps.inject(model, method, name="soft")
    for parameter in ps.trainable_parameters(model).values():
        parameter.data.normal_(0, 0.5)
    ids = torch.tensor([[5, 9, 2, 33, 7, 8]])
    with torch.no_grad():
        expected = model(ids).logits[0, -6:].numpy()
    report = ps.export_onnx(model, out=tmp_path / "onnx")
    assert "verified" in report.headline
    decoder = Decoder(tmp_path / "onnx")
    logits, _ = decoder.session.step(
        {
            "input_ids": ids.numpy(),
            "attention_mask": np.ones((1, 6), np.int64),
            "position_ids": np.arange(6)[None],
        },
        {n: np.zeros((1, h, 0, w), np.float32) for n, (h, w) in decoder.session.past_ports().items()},
    )
    assert np.abs(logits[0] - expected).max() <= 1e-4
    assert ps.adapters(model) == ("soft",)
    with torch.no_grad():
        assert torch.equal(model(ids).logits[0, -6:], torch.from_numpy(expected))


def test_tokens_are_drawn_as_asked() -> None:
    random = np.random.default_rng(0)
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]]))
    assert pick(logits, Sampling(), random).tolist() == [0]

    def drawn(**words: float) -> list[float]:
        found = [int(pick(logits, Sampling(temperature=1.0, **words), random)[0]) for _ in range(4000)]
        return (np.bincount(found, minlength=4) / 4000).tolist()

    assert np.allclose(drawn(), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    assert np.allclose(drawn(top_k=2), [0.625, 0.375, 0, 0], atol=0.03)
    assert np.allclose(drawn(top_p=0.79), [0.625, 0.375, 0, 0], atol=0.03)
    assert np.allclose(drawn(top_p=0.81), [0.526, 0.316, 0.158, 0], atol=0.03)


def test_what_does_not_fit_is_an_error(tmp_path: Path) -> None:
    ps.export_onnx(STORIES, out=tmp_path / "onnx", verify=False)
    with pytest.raises(PlanError, match="2 prompts and 3 prefixes"):
        ps.generate(tmp_path / "onnx", ["a", "b"], prefixes=["none"] * 3)
    with pytest.raises(AdapterError, match="no file of keys and values"):
        ps.generate(tmp_path / "onnx", "a", prefixes=[tmp_path / "lost"])
    save_file({"prefix.0.key": np.zeros((4, 2, 8), np.float32)}, tmp_path / "short")
    with pytest.raises(ExportError, match="the model has 5"):
        ps.generate(tmp_path / "onnx", "a", prefixes=[tmp_path / "short"])
    with pytest.raises(ExportError, match=r"no model\.onnx"):
        ps.generate(tmp_path, "a")
    with pytest.raises(PlanError, match="prefix is 'folded'"):
        ps.export_onnx(STORIES, out=tmp_path / "other", prefix="folded")
