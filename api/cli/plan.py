"""`galaxyline plan`: whether a deployment fits its chips, and how fast it is predicted to be."""

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from api.cli.options import PLAIN_COLUMNS
from api.cli.plan_logic import (
    DEFAULT_MAX_MODEL_LEN,
    DEFAULT_PROMPT_TOKENS,
    PREDICTED,
    Plan,
    PlanSettings,
    known_config,
    make_plan,
    write_plan,
)
from api.cli.weight_dtype_options import take_weight_dtypes, weight_dtype_options
from api.errors import OptionError
from api.settings.engine import DEFAULT_PREFILL_CHUNK
from api.settings.parameters import COUNT, LayerSplit
from stages.capacity.chip_memory import StageMemory
from stages.options import TRACE_REGION_BYTES
from stages.wormhole import GALAXY_COLUMNS, GALAXY_ROWS, USERS_PER_ROW
from weights.sizes import ceil_div, counted, in_words

MS = 1e3


def render(plan: Plan) -> Group:
    """A plan that fits."""
    return Group(
        _head(plan),
        *(Text(f"  assumed: {line}") for line in plan.assumptions),
        _memory_table(plan),
        Text(f"Speed, {PREDICTED}; milliseconds of a step, by what they go to:"),
        _time_table(plan),
        *(Text(line) for line in _speed(plan)),
    )


def _head(plan: Plan) -> Text:
    deployment = plan.deployment
    galaxies = counted(ceil_div(deployment.rows, GALAXY_ROWS), "Galaxy")
    text = Text.assemble((plan.model, "bold"))
    text.append(
        f" fits {counted(deployment.rows, 'row')} of {GALAXY_COLUMNS} chips ({galaxies}): "
        f"{counted(deployment.stages, 'stage')} of {counted(deployment.rows_per_stage, 'row')}, "
        f"{deployment.users_per_row} users a row in each of {counted(deployment.steps_in_flight, 'microbatch')}, "
        f"{deployment.users} requests in flight."
    )
    return text


def _memory_table(plan: Plan) -> Table:
    table = _table("stage", "layers", "weights", "KV cache", "tables", "activations", "trace", "total", "of", "full")
    for memory in plan.memory:
        parts = (memory.weights, memory.kv_cache, memory.tables, memory.activations, memory.trace)
        table.add_row(
            str(memory.stage),
            _layers(memory),
            *(in_words(part) for part in (*parts, memory.total, memory.available)),
            f"{memory.total / memory.available:.0%}",
        )
    table.caption = "DRAM of each chip of a stage"
    table.caption_justify = "left"
    return table


def _time_table(plan: Plan) -> Table:
    table = _table("stage", "decode", "memory", "compute", "network", "launches", "prefill chunk")
    for memory, decode, prefill in zip(plan.memory, plan.prediction.decode, plan.prediction.prefill, strict=True):
        parts = (decode.total_s, decode.memory_s, decode.compute_s, decode.network_s, decode.launch_s, prefill.total_s)
        table.add_row(str(memory.stage), *(f"{part * MS:.1f}" for part in parts))
    return table


def _speed(plan: Plan) -> Iterable[str]:
    prediction, options = plan.prediction, plan.options
    yield (
        f"{prediction.tokens_per_s_per_user:.2f} t/s/u, {prediction.tokens_per_s:.0f} tokens/s with all "
        f"{prediction.users} requests in flight ({PREDICTED})"
    )
    yield (
        f"{prediction.ttft_s:.2f} s to the first token of a prompt of {options.prompt_tokens} tokens on an idle "
        f"pipeline ({PREDICTED})"
    )
    steps = "replayed from traces" if options.traced else "launched op by op"
    experts = "all experts of a chip run" if options.expert_kernel == "all" else "only chosen experts run"
    yield f"Decode steps are {steps}; {experts}; sampling and other work of the hosts is not in it."


def _layers(memory: StageMemory) -> str:
    last = memory.end_layer - 1
    return str(last) if memory.first_layer == last else f"{memory.first_layer}-{last}"


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


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
        default=TRACE_REGION_BYTES,
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
