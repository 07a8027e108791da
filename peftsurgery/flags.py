"""The flags of the commands, as decorators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
SETTINGS = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "num_virtual_tokens",
    "prompt_tuning_init_text",
    "encoder_reparameterization_type",
    "prefix_projection",
)
"""The hyper-parameters that have a flag of their own."""


READINGS = ("strip_virtual_outputs", "pool", "position_shift")
"""The words of a reading of virtual tokens."""


def together(*options: Decorator) -> Decorator:
    """One decorator of several, whose options are shown in this order."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


report_options = together(
    click.option(
        "--json",
        "as_json",
        is_flag=True,
        help="Print the report as JSON on stdout; progress goes to stderr.",
    ),
    click.option("-q", "--quiet", is_flag=True, help="Show errors only."),
    click.option("-v", "--verbose", is_flag=True, help="Show the traceback of an error."),
)
"""The options that every command has; they say how to show, never what to do."""

trust_options = together(
    click.option("--allow-pickle", is_flag=True, help="Read a .bin adapter (weights only)."),
    click.option(
        "--trust-remote-code", is_flag=True, help="Run the Python code that the model directory brings."
    ),
)
"""The options of commands that read what others made."""

word_options = together(
    click.option("--targets", help="Sites: suffixes (query,value), globs, re:<regex>, or all-linear."),
    click.option("--exclude-modules", help="What stays out, in the words of --targets."),
    click.option("--layers-to-transform", help="Layer numbers, e.g. 0-3,7."),
    click.option("--layers-pattern", help="The name of the list of layers, where it is not evident."),
)
"""The options that choose sites."""

setting_options = together(
    click.option(
        "--set", "settings", multiple=True, metavar="NAME=VALUE", help="A hyper-parameter, e.g. r=16."
    ),
    click.option("--r", "--rank", type=int, help="Rank (r)."),
    click.option("--alpha", "lora_alpha", type=float, help="lora_alpha."),
    click.option("--dropout", "lora_dropout", type=float, help="lora_dropout."),
)
"""The options that say a method's hyper-parameters."""

soft_options = together(
    click.option("--num-virtual-tokens", type=int, help="How many tokens a prompt or a prefix has."),
    click.option(
        "--init-text",
        "prompt_tuning_init_text",
        help="The text that a prompt starts from, or is.",
    ),
    click.option(
        "--encoder",
        "encoder_reparameterization_type",
        type=click.Choice(["mlp", "lstm"]),
        help="p-tuning: the encoder.",
    ),
    click.option(
        "--projection", "prefix_projection", is_flag=True, help="prefix-tuning: train a projection."
    ),
)
"""The hyper-parameters of prompts and prefixes that have flags of their own."""

reading_options = together(
    click.option(
        "--strip-virtual-outputs",
        is_flag=True,
        help="A prompt: outputs per token as long as the input.",
    ),
    click.option(
        "--pool",
        type=click.Choice(["first", "cls"]),
        default="first",
        show_default=True,
        help="A prompt: what is pooled, the first virtual token or the first word.",
    ),
    click.option(
        "--no-position-shift",
        "position_shift",
        is_flag=True,
        default=True,
        flag_value=False,
        help="A prefix on an encoder: number the words from 0, as AdapterHub does.",
    ),
)
"""The options that say how virtual tokens are read, where it is not as in PEFT."""

export_options = together(
    click.option("--adapter", "adapters", multiple=True, help="An adapter to export with it. Repeatable."),
    click.option("-o", "--out", type=click.Path(), required=True, help="The directory to write."),
    click.option(
        "--factored",
        is_flag=True,
        help="Keep the adapter's factors in the graph instead of merging them.",
    ),
    click.option(
        "--weight",
        type=float,
        multiple=True,
        help="A factor for each adapter's effect, in their order.",
    ),
    click.option("--task", help="The task, e.g. seq-cls, where the checkpoint does not say it."),
    click.option("--opset", type=int, default=20, show_default=True, help="ONNX opset."),
    click.option(
        "--no-verify",
        "verify",
        is_flag=True,
        default=True,
        flag_value=False,
        help="Do not compare with torch.",
    ),
    click.option("--tolerance", type=float, help="Largest absolute difference allowed; 1e-4 for float32."),
    click.option(
        "--external-weights",
        is_flag=True,
        help="Keep the weights in model.onnx_data, whatever their size.",
    ),
    click.option(
        "--share-weights",
        type=click.Path(),
        metavar="ONNX_DIR",
        help="Link the weights of another export that are the same, instead of writing them again.",
    ),
    click.option(
        "--weights",
        type=click.Choice(["copy", "reference"]),
        default="copy",
        show_default=True,
        help="Write the weights with the graph, or let it read them in the checkpoint's own files.",
    ),
    click.option(
        "--prefix",
        type=click.Choice(["baked", "file"]),
        default="baked",
        show_default=True,
        help="A decoder's soft prompt: in the graph, or a file that a session feeds to the graph of the base.",
    ),
)
"""The options of an export."""

comparing_options = together(
    click.option(
        "--against",
        required=True,
        help="What it should equal: a model directory, an export's directory or an .onnx file.",
    ),
    click.option(
        "--adapter",
        "adapters",
        multiple=True,
        help="An adapter on the model of --against, or on MODEL where that is a graph. Repeatable.",
    ),
    click.option(
        "--weight", type=float, multiple=True, help="A factor for each adapter's effect, in their order."
    ),
    click.option("--task", help="The task, where the checkpoint does not say it."),
    click.option("--tolerance", type=float, help="Largest absolute difference allowed; 1e-4 for float32."),
    click.option("--texts", type=click.Path(), help="A file of texts to compare on, one a line."),
    click.option(
        "--new-tokens",
        type=click.IntRange(0),
        default=16,
        show_default=True,
        help="How many tokens both write.",
    ),
    click.option("--bits", is_flag=True, help="Run nothing: make every tensor of a merged checkpoint again."),
    click.option("--sample", type=int, help="Like --bits, for so many touched and so many other tensors."),
)

writing_options = together(
    click.option(
        "--prompt", "prompts", multiple=True, required=True, help="A text to go on with. Repeatable."
    ),
    click.option(
        "--prefix",
        "prefixes",
        multiple=True,
        metavar="FILE",
        help="A soft prompt for each prompt, or one for all; `none` for a row without. Repeatable.",
    ),
    click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True),
    click.option(
        "--temperature",
        type=float,
        default=0.0,
        show_default=True,
        help="0 takes the likeliest token.",
    ),
    click.option("--top-k", type=int, default=0, show_default=True, help="Draw among so many; 0 for all."),
    click.option(
        "--top-p",
        type=float,
        default=1.0,
        show_default=True,
        help="Draw among the likeliest with this share.",
    ),
    click.option("--seed", type=int, help="Of the draws."),
    click.option(
        "--provider",
        "providers",
        multiple=True,
        help="Where to run: cuda, cpu. Repeatable, best first.",
    ),
    click.option(
        "--threads",
        type=int,
        default=0,
        show_default=True,
        help="Of one operation; 0: as many as fit.",
    ),
)
"""The options that say what text to write, and how."""

merge_options = together(
    click.option("-o", "--out", type=click.Path(), help="The directory to write."),
    click.option(
        "--weight", type=float, multiple=True, help="A factor for each adapter's effect, in their order."
    ),
    click.option("--in-place", is_flag=True, help="Patch the files of MODEL itself; needs --undo."),
    click.option("--undo", type=click.Path(), help="--in-place: the file that keeps the original bytes."),
    click.option(
        "--untie", is_flag=True, help="Give a tied weight that the adapter changes a copy of its own."
    ),
    click.option("--task", help="The task of the merged model, where the adapter does not say it."),
    click.option("--dtype", help="float32, float16 or bfloat16; each tensor's own by default."),
    click.option(
        "--max-shard-size",
        help="Cut the weights into files of this size, e.g. 5GB; as the base by default.",
    ),
    click.option("--device", default="cpu", show_default=True, help="Where folding is computed, e.g. cuda."),
)
"""The options of merge, which say where and what it writes."""
