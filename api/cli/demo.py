"""The command line of `galaxyline demo`."""

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from api.cli.options import engine_options
from api.client.progress import LongWork
from api.demo.files import check_results_path, default_results_path, write_results
from api.demo.generation import lines
from api.demo.options import DEFAULT_MAX_NEW_TOKENS, DemoOptions
from api.demo.reference import ReferenceSettings, write_reference
from api.demo.run import Results, run
from api.demo.setup import DemoSetup
from api.settings.engine import EngineSettings
from api.settings.parameters import COUNT
from api.text.model_source import resolve_model
from stages.wormhole import USERS_PER_ROW

INTERRUPTED = 130
"""Exit code of a demo that a signal ended: 128 + SIGINT, as shells count."""

FILE = click.Path(dir_okay=False, path_type=Path)

_DEMO_OPTIONS = [
    click.argument("prompts", nargs=-1),
    click.option("--prompts-file", type=FILE, help="A JSON file of prompts, in place of PROMPTS."),
    click.option("--num-prompts", type=COUNT, help="So many prompts of --prompts-file."),
    click.option(
        "--output-path",
        type=click.Path(path_type=Path),
        help="Where the results of --prompts-file go.  [default: <prompts-file-stem>_output.json beside it]",
    ),
    click.option(
        "--checkpoint-jsonl", type=FILE, help="Append each prompt's result as it ends, and go on from what is there."
    ),
    click.option(
        "--max-new-tokens",
        type=COUNT,
        default=DEFAULT_MAX_NEW_TOKENS,
        show_default=True,
        help="Tokens of each completion.",
    ),
    click.option(
        "--generator",
        type=click.Choice(["bp", "pp"]),
        default="bp",
        show_default=True,
        help="bp: one stage that owns all rows; pp: a pipeline of --stages.",
    ),
    click.option(
        "--random-weights", is_flag=True, help="Random weights, of a single dense layer unless told otherwise."
    ),
    click.option("--single-layer", type=click.Choice(["mlp", "moe"]), help="The kind of layer of --random-weights."),
    click.option("--override-num-layers", type=COUNT, help="Only the first layers of the model."),
    click.option("--token-accuracy", is_flag=True, help="Follow references and report top-1 and top-5 accuracy."),
    click.option(
        "--reference-file", "reference_files", type=FILE, multiple=True, help="A .pt/.refpt file; may be repeated."
    ),
    click.option(
        "--tf-prompt-len", type=COUNT, help="Tokens of a reference that are its prompt.  [default: T // 2 + 1]"
    ),
    click.option(
        "--sampling-temperature", type=click.FloatRange(0, 2), default=0.0, show_default=True, help="0 is greedy."
    ),
    click.option("--sampling-top-k", type=click.IntRange(min=0), default=0, show_default=True, help="0 is all."),
    click.option(
        "--sampling-top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True, help="1 is all."
    ),
    click.option("--stop-at-eos/--no-stop-at-eos", default=True, show_default=True, help="End completions at EOS."),
    click.option(
        "--chat-template/--no-chat-template",
        default=False,
        show_default=True,
        help="Put each prompt into the chat template of the model's tokenizer, as a user's message.",
    ),
    click.option("--repeat-batches", type=COUNT, default=1, show_default=True, help="Complete all prompts so often."),
    click.option(
        "--max-users-per-row",
        type=COUNT,
        default=USERS_PER_ROW,
        show_default=True,
        help="Users of a Galaxy row in one microbatch, a multiple of 8.",
    ),
]


def _demo_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_DEMO_OPTIONS):
        command = option(command)
    return command


@click.command("demo")
@_demo_options
@click.option("--model-path", help="As --model of serve.  [default: $DEEPSEEK_V3_HF_MODEL, $HF_MODEL, then the sample]")
@click.option("--early_print_first_user", is_flag=True, help="Print the first prompt's tokens as they come.")
@engine_options
def demo_command(
    prompts: tuple[str, ...],
    reference_files: tuple[Path, ...],
    model_path: str | None,
    early_print_first_user: bool,
    engine: EngineSettings,
    **given: Any,
) -> None:
    """Complete PROMPTS, or those of a file, and print or write the completions and statistics."""
    options = DemoOptions(prompts=list(prompts), reference_files=list(reference_files), **given)
    setup = DemoSetup.of(options, engine, model_path, os.environ)
    output = _output_path(options)
    if output is not None:
        check_results_path(output)
    try:
        results = run(setup, _print_piece if early_print_first_user else None)
    except asyncio.CancelledError:
        sys.exit(INTERRUPTED)
    if early_print_first_user:
        click.echo()
    if output is None:
        _print(setup, results)
    else:
        write_results(output, setup.prompts, results)
        click.echo(f"Results saved to '{output}'")
    for line in lines(results["statistics"]):
        click.echo(line, err=True)


@click.command("reference")
@click.option(
    "--model", "model", help="Directory or hub id.  [default: $DEEPSEEK_V3_HF_MODEL, $HF_MODEL, then the sample]"
)
@click.option("--text-file", type=FILE, help="UTF-8 text that the model should predict.  [default: a built-in one]")
@click.option("--output-file", type=FILE, required=True, help="The .refpt file to write.")
@click.option("--total-length", type=click.IntRange(min=5), default=2048, show_default=True, help="Tokens of the text.")
def reference_command(model: str | None, text_file: Path | None, output_file: Path, total_length: int) -> None:
    """Write a reference file for `demo --token-accuracy` with Hugging Face's model, in float32."""
    settings = ReferenceSettings(
        source=resolve_model(model, os.environ),
        text_file=text_file,
        output_file=output_file,
        total_length=total_length,
    )
    count = write_reference(settings, LongWork(Console(stderr=True)))
    click.echo(f"{count} tokens in '{output_file}': galaxyline demo --token-accuracy --reference-file '{output_file}'")


def _output_path(options: DemoOptions) -> Path | None:
    if options.prompts_file is None:
        return None
    return options.output_path or default_results_path(options.prompts_file)


def _print(setup: DemoSetup, results: Results) -> None:
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
    told = f"Reference[{place}]: top-1 accuracy {generation['accuracy_top1']:.2%}"
    return told if top5 is None else f"{told}, top-5 accuracy {top5:.2%}"


def _print_piece(text: str) -> None:
    click.echo(text, nl=False)
