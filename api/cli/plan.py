"""`galaxyline plan`: whether a deployment fits its chips, and how fast it is predicted to be."""

import os
from pathlib import Path
from typing import Any

import click

from api.cli.options import options_of
from api.cli.parameters import LoggedCommand, result_console
from api.settings.engine import LengthOptions
from api.settings.model import ModelOptions, SplitOptions
from api.settings.option import again, made, take
from api.settings.planning import (
    DEFAULT_MAX_MODEL_LEN,
    PlanSettings,
    known_config,
    make_plan,
    write_plan,
)


@click.command("plan", cls=LoggedCommand)
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

    MODEL is a directory with a config.json, a hub id, r1 or v3: published models need no checkpoint. One that does not
    fit is refused, with the smallest changes that would make it.
    """
    name, config = known_config(take(ModelOptions, given).name(model_argument), os.environ)
    plan = make_plan(name, config, made(PlanSettings, given))
    if json_file is not None:
        write_plan(json_file, plan)
    from api.cli.tables import plan_text  # noqa: PLC0415 - imports rich

    result_console().print(plan_text(plan))
