"""The command line: parse, call the command of the same name, show its report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import click

from peftsurgery import __version__
from peftsurgery.errors import FleetError, ParityError, PlacementError, SurgeryError
from peftsurgery.flags.benching import benching_options
from peftsurgery.flags.chosen import chosen_method, chosen_reading
from peftsurgery.flags.common import reading_options, report_options, trust_options
from peftsurgery.flags.comparing import comparing_options
from peftsurgery.flags.exporting import export_options, writing_options
from peftsurgery.flags.merging import merge_options
from peftsurgery.flags.tuning import setting_options, soft_options, word_options
from peftsurgery.pause import importing

EXIT_FAILED, EXIT_USAGE = 1, 2


class Group(click.Group):
    """Commands in the order of a life: look, cut, fold, export, prove."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="peftsurgery")
def main() -> None:
    """The operating table for models with parameter-efficient adapters."""


def run(shown: Mapping[str, Any], call: Callable[..., Any], *, bad_input: int = EXIT_FAILED) -> None:
    """Call a command with a progress bar, show its report, and turn its errors into exit codes.

    Args:
        bad_input: the code of every error but a comparison's, where a script has to tell them apart.
    """
    from peftsurgery.progress import bars

    try:
        with bars(quiet=shown["quiet"]) as listen:
            report = call(listen)
    except SurgeryError as error:
        if shown["verbose"]:
            raise
        report = error.report if isinstance(error, ParityError | FleetError | PlacementError) else None
        if report is not None:
            show(shown, report)
        click.echo(f"Error: {error}", err=True)
        sys.exit(EXIT_FAILED if isinstance(error, ParityError) else bad_input)
    except KeyboardInterrupt as stop:
        click.echo(str(stop) or "Interrupted; inputs are untouched and nothing was left behind.", err=True)
        sys.exit(EXIT_FAILED)
    show(shown, report)


def show(shown: Mapping[str, Any], report: Any) -> None:
    """Print a report in the form that was asked for."""
    if shown["as_json"]:
        click.echo(report.to_json())
    elif not shown["quiet"]:
        click.echo(str(report))


def shown(options: dict[str, Any]) -> dict[str, Any]:
    """Take the options of `report_options` out of the command's own."""
    return {name: options.pop(name) for name in ("verbose", "quiet", "as_json")}


@main.command("inspect")
@click.argument("model")
@word_options
@click.option("--tree", is_flag=True, help="Show every site.")
@click.option("--task", help="Look at the model as this task has it, e.g. seq-cls.")
@trust_options
@report_options
def inspect_command(**options: Any) -> None:
    """What a model directory, an adapter or an .onnx file is made of."""
    from peftsurgery.commands.inspect import inspect

    flags = shown(options)
    run(flags, lambda listen: inspect(**options))


@main.command("inject")
@click.argument("model")
@click.option(
    "--method",
    default="lora",
    show_default=True,
    help="lora, prompt-tuning, p-tuning, prefix-tuning, hard-prompt, bottleneck or fusion.",
)
@click.option(
    "--config",
    help="bottleneck: pfeiffer, houlsby, parallel or scaled-parallel, which say its places too.",
)
@click.option("--adapters", metavar="A,B", help="fusion: the directories of the adapters that it fuses.")
@word_options
@setting_options
@soft_options
@click.option(
    "--rank-pattern", multiple=True, metavar="KEY=R", help="Another r for names that match KEY. Repeatable."
)
@click.option(
    "--alpha-pattern", multiple=True, metavar="KEY=A", help="Another lora_alpha for names that match KEY."
)
@click.option(
    "--modules-to-save", multiple=True, help="A head that trains and travels with the adapter. Repeatable."
)
@click.option("--bias", type=click.Choice(["none", "lora_only", "all"]), default="none", show_default=True)
@click.option("--task", help="The task, e.g. seq-cls: its heads train and travel with the adapter.")
@click.option("--name", help="What the adapter is called.")
@click.option("--seed", type=int, help="Makes the fresh parameters reproducible.")
@click.option("-o", "--out", type=click.Path(), help="The directory to write the fresh adapter to.")
@click.option(
    "--dry-run", is_flag=True, help="Show what would be hit, per pattern and per layer; write nothing."
)
@trust_options
@report_options
def inject_command(**options: Any) -> None:
    """Write a fresh adapter for MODEL, which PEFT and peftsurgery load and train."""
    from peftsurgery.commands.inject import inject
    from peftsurgery.commands.words import config_named, numbers

    flags, config = shown(options), options["config"]
    method = chosen_method(options)
    options["modules_to_save"] = options["modules_to_save"] or None
    options["adapters"] = options["adapters"].split(",") if options["adapters"] else ()

    def call(listen: object) -> Any:
        if config is not None and options["targets"] is None:
            options["targets"] = config_named(config).targets
        options.update({name: numbers(options[name]) for name in ("rank_pattern", "alpha_pattern")})
        return inject(method=method(), **options)

    run(flags, call)


@main.command("remove")
@click.argument("model")
@click.option("-o", "--out", type=click.Path(), help="The directory for the clean base.")
@click.option("--adapter-out", type=click.Path(), help="The directory for the adapter.")
@click.option("--name", help="Which adapter, where there are several.")
@click.option("--method", default="lora", show_default=True, help="What the adapter is.")
@setting_options
@report_options
def remove_command(**options: Any) -> None:
    """Take the tuner modules out of a checkpoint that was saved with them inside."""
    from peftsurgery.commands.remove import remove

    flags, method = shown(options), chosen_method(options, needed=False)
    run(flags, lambda listen: remove(listen=listen, method=method(), **options))


@main.command("merge")
@click.argument("model")
@click.argument("adapters", nargs=-1)
@merge_options
@trust_options
@report_options
def merge_command(**options: Any) -> None:
    """Fold ADAPTERS into MODEL (a directory or an .onnx file) and write the result."""
    if not options["adapters"] and options["adapters_from"] is None:
        raise click.UsageError("Missing argument 'ADAPTERS...', or `--adapters-from LIST`.")
    with importing():
        from peftsurgery.commands.merge import merge

    flags = shown(options)
    run(flags, lambda listen: merge(listen=listen, **options))


@main.command("unmerge")
@click.argument("model")
@click.option("--undo", type=click.Path(), required=True, help="The undo file of the merge in place.")
@report_options
def unmerge_command(**options: Any) -> None:
    """Give MODEL, merged in place, the bytes that it had."""
    from peftsurgery.commands.in_place import unmerge

    flags = shown(options)
    run(flags, lambda listen: unmerge(listen=listen, **options))


@main.command("bake")
@click.argument("adapter")
@click.option("-o", "--out", type=click.Path(), required=True, help="The directory to write.")
@click.option("--base", help="A model directory that the tokens have to fit.")
@trust_options
@report_options
def bake_command(**options: Any) -> None:
    """Evaluate ADAPTER's encoder: p-tuning becomes a prompt table, a projected prefix keys and values."""
    from peftsurgery.commands.bake import bake

    flags = shown(options)
    run(flags, lambda listen: bake(**options))


@main.command("convert")
@click.argument("adapter")
@click.option("--to", type=click.Choice(["peft", "adapterhub"]), required=True, help="The format to write.")
@click.option("-o", "--out", type=click.Path(), required=True, help="The directory to write.")
@click.option("--base", help="The model directory that the adapter is for; heads and prefixes need it.")
@trust_options
@report_options
def convert_command(**options: Any) -> None:
    """Write ADAPTER in the other library's format, where both compute the same with it."""
    from peftsurgery.commands.convert import convert

    flags = shown(options)
    run(flags, lambda listen: convert(**options))


@main.command("export-onnx")
@click.argument("model")
@export_options
@reading_options
@trust_options
@report_options
def export_onnx_command(**options: Any) -> None:
    """Export MODEL to ONNX, with adapters merged or factored, and verify it in ONNX Runtime."""
    from peftsurgery.commands.export_onnx import export_onnx

    flags, said = shown(options), chosen_reading(options)
    run(flags, lambda listen: export_onnx(listen=listen, reading=said(), **options))


@main.command("generate")
@click.argument("model", metavar="ONNX_DIR")
@writing_options
@report_options
def generate_command(**options: Any) -> None:
    """Go on with a text, or answer it, by the export of a model that writes."""
    from peftsurgery.commands.generate import generate

    flags = shown(options)
    silent = flags["quiet"] or flags["as_json"] or len(options["prompts"]) > 1

    def say(event: Any) -> None:
        click.echo(event.name + ("\n" if event.done == event.total else ""), nl=False)

    run(flags, lambda listen: generate(listen=listen if silent else say, **options))


@main.command("verify")
@click.argument("model")
@comparing_options
@reading_options
@trust_options
@report_options
def verify_command(**options: Any) -> None:
    """Run two models on the same inputs and compare; exit code 1 when they differ, 2 when they cannot be compared."""
    from peftsurgery.commands.verify import verify

    flags, said = shown(options), chosen_reading(options)
    run(flags, lambda listen: verify(listen=listen, reading=said(), **options), bad_input=EXIT_USAGE)


@main.command("bench")
@click.argument("model", metavar="ONNX_DIR")
@benching_options
@trust_options
@report_options
def bench_command(**options: Any) -> None:
    """Time an export, beside its model in torch and the graph of torch's own exporter, in turns."""
    from peftsurgery.commands.bench import bench

    flags = shown(options)
    run(flags, lambda listen: bench(listen=listen, **options))
