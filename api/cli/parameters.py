"""What commands share: the types that options are read with, and the console that tables are printed on."""

import json
import math
import sys
from typing import Any

import click
from rich.console import Console

PLAIN_COLUMNS = 120

"""The width of a table that does not go to a terminal."""


def result_console(plain_columns: int = PLAIN_COLUMNS) -> Console:
    """The console on stdout: as wide as the terminal, or `plain_columns` without one."""
    return Console() if sys.stdout.isatty() else Console(width=plain_columns)


class LayerSplit(click.ParamType[list[int]]):
    """Numbers of layers with commas between, like "2,4"."""

    name = "n,n,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """Returns the numbers. Raises click.BadParameter unless all are positive."""
        parts = str(value).split(",")
        if not all(part.strip().isdecimal() and int(part) for part in parts):
            self.fail(f"{value!r} is not a list of layer counts: write it like 2,4.", param, ctx)
        return [int(part) for part in parts]


class Milliseconds(click.ParamType[list[float]]):
    """Times with commas between, like "10,12.5"."""

    name = "ms,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        """Returns the times. Raises click.BadParameter unless all are positive."""
        try:
            times = [float(part) for part in str(value).split(",")]
        except ValueError:
            times = []
        if not times or not all(0 < time < math.inf for time in times):
            self.fail(f"{value!r} is not a list of times: write it like 10 or 10,12.5.", param, ctx)
        return times


class JsonObject(click.ParamType[dict[str, object]]):
    """A JSON object on the command line."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, object]:
        """Returns the object. Raises click.BadParameter for anything else."""
        try:
            parsed = json.loads(value)
        except ValueError as error:
            self.fail(f"{value!r} is not valid JSON: {error}.", param, ctx)
        if not isinstance(parsed, dict):
            self.fail(f"{value!r} is not a JSON object.", param, ctx)
        return parsed
