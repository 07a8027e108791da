"""The options of merge, which say where and what it writes."""

from __future__ import annotations

import click

from peftsurgery.flags.common import weight_option
from peftsurgery.flags.together import together

merge_options = together(
    click.option("-o", "--out", type=click.Path(), help="The directory to write."),
    weight_option,
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
    click.option(
        "--adapters-from",
        metavar="LIST",
        type=click.Path(),
        help="Merge each adapter of a list (lines `path` or `name=path`), or of a directory, into OUT/NAME.",
    ),
    click.option(
        "--share-untouched",
        is_flag=True,
        help="Do not write weights again that no adapter touches: link them.",
    ),
    click.option(
        "--engine",
        type=click.Choice(["local", "ray"]),
        default="local",
        show_default=True,
        help="Who writes a checkpoint's files: this process, or the nodes of a Ray cluster.",
    ),
    click.option(
        "--hash",
        is_flag=True,
        help="Record the SHA-256 of every byte of MODEL and ADAPTERS in peftsurgery.json.",
    ),
    click.option(
        "--resume", is_flag=True, help="Go on with what an interrupted merge of the same into OUT left."
    ),
)
"""The options of merge, which say where and what it writes."""
