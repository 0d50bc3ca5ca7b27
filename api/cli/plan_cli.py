"""The command line of `galaxyline plan`."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from api.cli.options import COUNT, PLAIN_COLUMNS, LayerSplit
from api.cli.plan import DEFAULT_MAX_MODEL_LEN, DEFAULT_PROMPT_TOKENS, PlanSettings, known_config, make_plan, write_plan
from api.cli.plan_report import render
from api.cli.weight_dtype_options import take_weight_dtypes, weight_dtype_options
from api.errors import OptionError
from api.settings.engine import DEFAULT_PREFILL_CHUNK
from stages.capacity.deployment import DEFAULT_TRACE_REGION_BYTES
from stages.plan import USERS_PER_ROW

_OPTIONS: list[Callable[[Callable[..., None]], Callable[..., None]]] = [
    click.argument("model_argument", metavar="[MODEL]", required=False),
    click.option("--model", help="As MODEL.  [default: $DEEPSEEK_V3_HF_MODEL, $HF_MODEL, then the sample]"),
    click.option("--rows", type=COUNT, help="Galaxy rows in all.  [default: the fewest whole Galaxies that fit]"),
    click.option("--stages", "--pipeline-parallel-size", type=COUNT, help="Pipeline stages.  [default: the fastest]"),
    click.option("--rows-per-stage", type=COUNT, help="Rows of each stage.  [default: the fastest]"),
    click.option(
        "--layers-per-stage", type=LayerSplit(), help="An explicit split, like 31,30.  [default: what evens out memory]"
    ),
    click.option(
        "--users",
        "--max-users-per-row",
        type=COUNT,
        default=USERS_PER_ROW,
        show_default=True,
        help="Users of a row in one microbatch, a multiple of 8.",
    ),
    click.option("--microbatches", type=COUNT, help="Steps in flight at once.  [default: one more than stages]"),
    click.option(
        "--max-model-len",
        "--max-seq-len",
        type=COUNT,
        help=f"Tokens of prompt and completion.  [default: {DEFAULT_MAX_MODEL_LEN}, or the model's]",
    ),
    click.option("--block-size", type=COUNT, default=32, show_default=True, help="Tokens of a KV cache block."),
    click.option(
        "--prefill-chunk",
        "--max-num-batched-tokens",
        type=COUNT,
        default=DEFAULT_PREFILL_CHUNK,
        show_default=True,
        help="Prompt tokens of one step at most.",
    ),
    click.option(
        "--trace-region",
        type=click.IntRange(min=0),
        default=DEFAULT_TRACE_REGION_BYTES,
        show_default=True,
        help="Bytes of each chip that are set aside for traces.",
    ),
    click.option(
        "--context", type=COUNT, help="Tokens cached for each user that decodes.  [default: half the longest]"
    ),
    click.option(
        "--prompt", type=COUNT, help=f"Tokens of a prompt.  [default: {DEFAULT_PROMPT_TOKENS}, or the longest]"
    ),
    click.option("--enable-trace", "traced", is_flag=True, help="Predict decode steps that are replayed from traces."),
    click.option(
        "--expert-kernel",
        type=click.Choice(["all", "chosen"]),
        default="all",
        show_default=True,
        help="all: a chip runs all its experts on every token, as the modules do; chosen: only those that were chosen.",
    ),
    click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="A file for the plan."),
]


def _plan_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed([*_OPTIONS, *weight_dtype_options]):
        command = option(command)
    return command


@click.command("plan")
@_plan_options
def plan_command(model_argument: str | None, model: str | None, json_file: Path | None, **given: Any) -> None:
    """Say whether MODEL fits some Galaxy rows, and predict its speed there.

    MODEL is a directory with a config.json, a hub id, or r1: published models need no checkpoint. One that does not fit
    is refused, with the smallest changes that would make it.
    """
    if model is not None and model_argument not in {None, model}:
        raise OptionError(f"Two models are given, {model_argument!r} and --model {model!r}: leave one out.")
    dtypes = take_weight_dtypes(given)
    name, config = known_config(model or model_argument, os.environ)
    plan = make_plan(name, config, PlanSettings(dtypes=dtypes, **given))
    if json_file is not None:
        write_plan(json_file, plan)
    console = Console() if sys.stdout.isatty() else Console(width=PLAIN_COLUMNS)
    console.print(render(plan))
