"""The options that choose sites, a method and its hyper-parameters."""

from __future__ import annotations

import click

from peftsurgery.flags.together import together

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
