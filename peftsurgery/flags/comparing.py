"""The options of verify."""

from __future__ import annotations

import click

from peftsurgery.flags.common import weight_option
from peftsurgery.flags.together import together

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
    weight_option,
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
    click.option("--layers", is_flag=True, help="Compare layer by layer too, and say where they part first."),
    click.option("--bits", is_flag=True, help="Run nothing: make every tensor of a merged checkpoint again."),
    click.option("--sample", type=int, help="Like --bits, for so many touched and so many other tensors."),
)
