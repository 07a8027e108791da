"""The options of exports, and of writing with them."""

from __future__ import annotations

import click

from peftsurgery.flags.common import provider_option, weight_option
from peftsurgery.flags.together import together

export_options = together(
    click.option("--adapter", "adapters", multiple=True, help="An adapter to export with it. Repeatable."),
    click.option("-o", "--out", type=click.Path(), required=True, help="The directory to write."),
    click.option(
        "--factored",
        is_flag=True,
        help="Keep the adapter's factors in the graph instead of merging them.",
    ),
    weight_option,
    click.option("--task", help="The task, e.g. seq-cls, where the checkpoint does not say it."),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "float16", "bfloat16"]),
        help="Of weights, keys, values and logits; the model's own by default.",
    ),
    click.option(
        "--check-placement",
        type=click.Choice(["cuda"]),
        help="Look up whether every node that computes has a kernel there; no GPU is needed.",
    ),
    click.option(
        "--for",
        "target",
        type=click.Choice(["cpu", "cuda"]),
        default="cpu",
        show_default=True,
        help="What the graph is for: cuda has larger operators in the place of many.",
    ),
    click.option(
        "--opset",
        type=int,
        help="ONNX opset; 24 by default; 20 with --portable.",
    ),
    click.option(
        "--no-verify",
        "verify",
        is_flag=True,
        default=True,
        flag_value=False,
        help="Do not compare with torch.",
    ),
    click.option(
        "--tolerance",
        type=float,
        help="Largest absolute difference allowed; 1e-4 for float32, 8 steps of a half.",
    ),
    click.option(
        "--weights",
        type=click.Choice(["reference", "copy", "inline"]),
        help="Read the weights in the checkpoint's own files (the default, where it can be), copy them to "
        "model.onnx.data, or keep them in the graph.",
    ),
    click.option(
        "--portable",
        is_flag=True,
        help="Use operators of ONNX alone, and none of ONNX Runtime's own.",
    ),
    click.option(
        "--hash",
        is_flag=True,
        help="Let the certificate know weight files by the SHA-256 of every byte.",
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
    provider_option,
    click.option(
        "--threads",
        type=int,
        default=0,
        show_default=True,
        help="Of one operation; 0: as many as fit.",
    ),
)
"""The options that say what text to write, and how."""
