"""What commands share: how they are run, the types that options are read with, and the console of tables."""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from actors.log import LateLogger, configure_logging
from api.settings.option import spelt_as

if TYPE_CHECKING:
    from rich.console import Console

    from api.client.progress import LongWork

PLAIN_COLUMNS = 120
"""The width of what does not go to a terminal, unless COLUMNS says otherwise."""

COLUMNS_MIN = 20

NOTES = "api.cli.notes"
"""The key in a context's `meta` of what is to be logged when the command begins."""

log = LateLogger(__name__)


class LoggedCommand(click.Command):
    """A command that sets up logging before it runs."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        # Nothing that is started or imported below can do without; some of it ends the process without a word.
        Path.cwd()
        configure_logging()
        for event, fields in ctx.meta.pop(NOTES, []):
            log.info(event, **fields)
        return super().invoke(ctx)


def begin_work() -> None:
    """Tells the program, where a command is one, that signals have something to tidy up: see `api.cli.__main__`."""
    ctx = click.get_current_context(silent=True)
    if ctx is not None and ctx.obj is not None:
        ctx.obj()


def long_work() -> "LongWork":
    """The progress of a command's work, on stderr; what is imported for the work is there by its first step."""
    from rich.console import Console  # noqa: PLC0415 - --help does without

    from api.client.progress import LongWork  # noqa: PLC0415 - imports rich

    class CommandWork(LongWork):
        @contextmanager
        def steps(self, what: str, total: int) -> Iterator[Callable[[str], None]]:
            begin_work()
            with super().steps(what, total) as done:
                yield done

    return CommandWork(Console(stderr=True))


def note(ctx: click.Context, event: str, **fields: object) -> None:
    """Has something logged when the command begins: logging is not set up yet while options are read."""
    ctx.meta.setdefault(NOTES, []).append((event, fields))


def result_console() -> "Console":
    """The console on stdout: as wide as COLUMNS says, else as the terminal, or PLAIN_COLUMNS without one."""
    from rich.console import Console  # noqa: PLC0415 - --help does without

    class ResultConsole(Console):
        def on_broken_pipe(self) -> None:
            # rich would exit with 1 here.
            raise BrokenPipeError

    return ResultConsole(width=console_width(os.environ, is_terminal=sys.stdout.isatty()))


def console_width(environment: Mapping[str, str], *, is_terminal: bool) -> int | None:
    """The columns that may be written; None for those of the terminal."""
    columns = environment.get("COLUMNS", "")
    if columns.isdecimal() and int(columns):
        return max(int(columns), COLUMNS_MIN)
    return None if is_terminal else PLAIN_COLUMNS


class Spellings(click.Choice[str]):
    """A choice that may be spelt with - or _, and in capitals; it is shown and given on as it is in the code."""

    def normalize_choice(self, choice: object, ctx: click.Context | None) -> str:
        """The choice that is meant, else what was given."""
        return spelt_as(self.choices, str(choice))


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
