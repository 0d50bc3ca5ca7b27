"""`galaxyline plan`: whether a deployment fits its chips, and how fast it is predicted to be."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from api.cli.options import options_of
from api.cli.parameters import result_console
from api.settings.engine import LengthOptions
from api.settings.model import ModelOptions, SplitOptions
from api.settings.option import again, made, take
from api.settings.planning import (
    DEFAULT_MAX_MODEL_LEN,
    PREDICTED,
    Plan,
    PlanSettings,
    known_config,
    make_plan,
    write_plan,
)
from stages.capacity.chip_memory import StageMemory
from stages.wormhole import GALAXY_COLUMNS, GALAXY_ROWS
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


@click.command("plan")
@click.argument("model_argument", metavar="[MODEL]", required=False)
@options_of(ModelOptions, only={"model"})
@options_of(
    PlanSettings,
    instead={
        "stages": again(SplitOptions, "stages", "Pipeline stages.", "the fastest"),
        "layers_per_stage": again(
            SplitOptions, "layers_per_stage", "An explicit split, like 31,30.", "what evens out memory"
        ),
        "max_model_len": again(LengthOptions, "max_model_len", default=f"{DEFAULT_MAX_MODEL_LEN}, or the model's"),
    },
)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="A file for the plan.")
def plan_command(model_argument: str | None, json_file: Path | None, **given: Any) -> None:
    """Say whether MODEL fits some Galaxy rows, and predict its speed there.

    MODEL is a directory with a config.json, a hub id, or r1: published models need no checkpoint. One that does not fit
    is refused, with the smallest changes that would make it.
    """
    name, config = known_config(take(ModelOptions, given).name(model_argument), os.environ)
    plan = make_plan(name, config, made(PlanSettings, given))
    if json_file is not None:
        write_plan(json_file, plan)
    result_console().print(render(plan))
