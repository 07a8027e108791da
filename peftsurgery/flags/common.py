"""The options that several commands have."""

from __future__ import annotations

import click

from peftsurgery.flags.together import together

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

weight_option = click.option(
    "--weight", type=float, multiple=True, help="A factor for each adapter's effect, in their order."
)
provider_option = click.option(
    "--provider", "providers", multiple=True, help="Where graphs run: cuda, cpu. Repeatable, best first."
)

trust_options = together(
    click.option("--allow-pickle", is_flag=True, help="Read a .bin adapter (weights only)."),
    click.option(
        "--trust-remote-code", is_flag=True, help="Run the Python code that the model directory brings."
    ),
)
"""The options of commands that read what others made."""

READINGS = ("strip_virtual_outputs", "pool", "position_shift")
"""The words of a reading of virtual tokens."""

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
