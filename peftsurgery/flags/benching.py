"""The options of bench."""

from __future__ import annotations

import click

from peftsurgery.flags.common import provider_option, weight_option
from peftsurgery.flags.together import together

benching_options = together(
    click.option("--against", help="A model directory: in torch, compiled, and torch's own export of it."),
    click.option(
        "--adapter",
        "adapters",
        multiple=True,
        help="An adapter to merge into the model of --against. Repeatable.",
    ),
    weight_option,
    click.option("--task", help="The task of --against, where its checkpoint does not say it."),
    click.option("--batch", default="1,8", show_default=True, help="Rows of the texts, or images."),
    click.option("--length", default="16,128,512", show_default=True, help="Tokens of a row."),
    click.option(
        "--new-tokens",
        type=click.IntRange(1),
        default=16,
        show_default=True,
        help="How many tokens are written behind each text.",
    ),
    click.option(
        "--runs", type=click.IntRange(2), default=20, show_default=True, help="Rounds, one run of each."
    ),
    provider_option,
    click.option(
        "--threads",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        help="Of one operation; 0: as many as fit.",
    ),
    click.option(
        "--cuda-graph", is_flag=True, help="Let CUDA replay a run as one; for graphs without a cache."
    ),
    click.option("--plot", type=click.Path(), help="A .png, .svg or .pdf for a bar chart."),
)
"""The options that say what is timed, beside what, and how often."""
