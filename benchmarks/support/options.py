"""The command of a benchmark, with the options that all of them have."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from actors.log import LEVEL_VARIABLE, configure_logging
from api.errors import exit_code
from stages.device import DEVICE_VARIABLE, Device
from weights.errors import GalaxylineError

DEFAULT_OUT = Path("generated/bench")

COMPUTING: tuple[Device, ...] = ("embedded", "ttnn")
"""The devices that compute, on which most benchmarks run."""

_OPTIONS = [
    click.option("--short", is_flag=True, help="Run for seconds, to show that it runs; the figures mean little."),
    click.option(
        "--out",
        type=click.Path(file_okay=False, path_type=Path),
        default=DEFAULT_OUT,
        show_default=True,
        help="Where the figures are written, as BENCHMARK.DEVICE.json.",
    ),
]


class BenchmarkCommand(click.Command):
    """A command that prints the program's own errors and exits with their code, as `galaxyline` does."""

    def invoke(self, ctx: click.Context) -> object:
        """Runs the command."""
        # The output is to be the tables, not a line for every request and every stage that starts.
        os.environ.setdefault(LEVEL_VARIABLE, "warning")
        configure_logging()
        try:
            return super().invoke(ctx)
        except GalaxylineError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(exit_code(error))


def benchmark_command(
    name: str, devices: Sequence[Device] = COMPUTING
) -> Callable[[Callable[..., None]], click.Command]:
    """Decorates the function of the command `python -m benchmarks.NAME`, with --short, --device and --out.

    The default of --device is the first of `devices`.
    """
    device = click.option(
        "--device",
        type=click.Choice(devices),
        default=devices[0],
        show_default=True,
        help="What the stages run on: a chip each with ttnn.",
    )

    def decorate(function: Callable[..., Any]) -> click.Command:
        for option in (device, *reversed(_OPTIONS)):
            function = option(function)
        settings = {"help_option_names": ["-h", "--help"], "max_content_width": 120}
        return click.command(name, cls=BenchmarkCommand, context_settings=settings)(function)

    return decorate


def bind_process(device: Device) -> None:
    """Restarts this program if its process is bound to another device than `device`."""
    if os.environ.get(DEVICE_VARIABLE, "embedded") != device:
        # The interpreter's own arguments: `python -m benchmarks.NAME` and its options.
        os.execve(sys.executable, sys.orig_argv, {**os.environ, DEVICE_VARIABLE: device})
