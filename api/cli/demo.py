"""The command line of `galaxyline demo`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from api.cli.options import log_level, options_of, override_tt_config
from api.cli.parameters import LoggedCommand
from api.demo.files import RESULTS_FLAG, default_results_path, write_results
from api.demo.options import DemoOptions
from api.settings.engine import EngineSettings
from api.settings.environment import note_environment
from api.settings.model import ModelPathOption
from api.settings.option import made, take
from api.settings.paths import prepare_file

if TYPE_CHECKING:
    from api.demo.run import Results
    from api.demo.setup import DemoSetup


@click.command("demo", cls=LoggedCommand)
@click.argument("prompts", nargs=-1)
@options_of(DemoOptions)
@options_of(ModelPathOption)
@click.option("--early_print_first_user", is_flag=True, help="Print the first prompt's tokens as they come.")
@options_of(EngineSettings, without={"spare", "enable_prefix_caching", "kv_host_memory", "kv_dir", "kv_disk"})
@override_tt_config
@log_level
def demo_command(prompts: tuple[str, ...], early_print_first_user: bool, trace_mode: bool, **given: Any) -> None:
    """Complete PROMPTS, or those of a file, and print or write the completions and statistics."""
    # Imports of half a second, which --help does without.
    from api.demo.generation import lines  # noqa: PLC0415
    from api.demo.run import run  # noqa: PLC0415
    from api.demo.setup import DemoSetup  # noqa: PLC0415

    given["enable_trace"] |= trace_mode
    note_environment(os.environ)
    model_path = take(ModelPathOption, given).model_path
    engine = take(EngineSettings, given)
    options = made(DemoOptions, {**given, "prompts": prompts})
    setup = DemoSetup.of(options, engine, model_path, os.environ)
    output = _output_path(options)
    if output is not None:
        prepare_file(output, RESULTS_FLAG)
    results = run(setup, _print_text if early_print_first_user else None)
    if early_print_first_user:
        click.echo()
    if output is None:
        _print(setup, results)
    else:
        write_results(output, setup.prompts, results)
        click.echo(f"Results saved to '{output}'")
    for line in lines(results["statistics"]):
        click.echo(line, err=True)


def _output_path(options: DemoOptions) -> Path | None:
    if options.prompts_file is None:
        return None
    return options.output_path or default_results_path(options.prompts_file)


def _print(setup: "DemoSetup", results: "Results") -> None:
    click.echo("\n===== Generated =====\n")
    for place, generation in enumerate(results["generations"]):
        if setup.options.random_weights:
            click.echo(f"[random-weights mode] token IDs: {generation['tokens']}\n")
            continue
        if "accuracy_top1" in generation:
            click.echo(_accuracy(place, generation))
            continue
        click.echo(f"Prompt[{place}]: {setup.prompts[place]}\nGeneration[{place}]: {generation['text']}\n")


def _accuracy(place: int, generation: dict[str, Any]) -> str:
    top5 = generation.get("accuracy_top5")
    line = f"Reference[{place}]: top-1 accuracy {generation['accuracy_top1']:.2%}"
    return line if top5 is None else f"{line}, top-5 accuracy {top5:.2%}"


def _print_text(text: str) -> None:
    click.echo(text, nl=False)
