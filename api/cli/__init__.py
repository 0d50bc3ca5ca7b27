"""The command line: `galaxyline serve`, `galaxyline demo` and `galaxyline status`."""

import sys
from typing import Any

import click
import msgspec
import uvloop
from rich.console import Console

from actors.log import configure_logging
from api.cli.cache import cache_group, convert_command
from api.cli.demo import demo_command, reference_command
from api.cli.options import PLAIN_COLUMNS, engine_options, model_options, num_scheduler_steps
from api.cli.plan import plan_command
from api.cli.status import follow, read_view, render
from api.errors import exit_code
from api.server.serve import ServeSettings, serve
from api.settings.parameters import COUNT, SECONDS
from api.settings.server import KEY_VARIABLES, front_options
from api.text.generation_config import MODELS_OWN, NO_ADVICE
from api.text.served_model import DEFAULT_MAX_LOGPROBS, WHOLE_VOCABULARY
from weights.errors import GalaxylineError
from weights.release import VERSION


class CommandGroup(click.Group):
    """Shows our errors as a sentence on stderr, without a traceback, and exits with the code of their class."""

    def invoke(self, ctx: click.Context) -> object:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except GalaxylineError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(exit_code(error))


@click.group(
    cls=CommandGroup,
    context_settings={
        "token_normalize_func": lambda name: name.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
        "max_content_width": 120,
    },
)
@click.version_option(VERSION, prog_name="galaxyline")
def main() -> None:
    """DeepSeek-V3/R1 over a pipeline of stages. Options may be spelt with - or _."""
    configure_logging()


@main.command("serve")
@model_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes any free one.")
@click.option(
    "--replicas",
    type=COUNT,
    default=1,
    show_default=True,
    help="Pipelines of this kind, independent of each other; a request goes to the one with the fewest.",
)
@click.option(
    "--shutdown-timeout",
    "shutdown_timeout_s",
    type=SECONDS,
    default=5.0,
    show_default=True,
    help="Seconds that open requests have to end after SIGINT or SIGTERM.",
)
@click.option(
    "--max-logprobs",
    type=click.IntRange(min=WHOLE_VOCABULARY),
    default=DEFAULT_MAX_LOGPROBS,
    show_default=True,
    help="Log-probabilities that a request may ask for at each position; -1: as many as the vocabulary has tokens.",
)
@click.option(
    "--generation-config",
    default=MODELS_OWN,
    show_default=True,
    help=f"Where defaults of requests come from: {MODELS_OWN}: the model's generation_config.json; {NO_ADVICE}: vLLM's "
    "own; or a directory with such a file.",
)
@click.option(
    "--spare/--no-spare",
    default=True,
    show_default=True,
    help="Keep a process on each host that has all imported and takes the place of a stage that is lost.",
)
@num_scheduler_steps
@front_options
@engine_options
def serve_command(**settings: Any) -> None:
    """Serve MODEL, a directory or a hub id, over HTTP; without one, the sample model."""
    uvloop.run(serve(ServeSettings(**settings)))


@main.command("status")
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The server's address.")
@click.option(
    "--api-key",
    envvar=KEY_VARIABLES,
    help=f"A key of the server, where it wants one.  [default: ${', then $'.join(KEY_VARIABLES)}]",
)
@click.option("--once", is_flag=True, help="Print one look and end; so it is where the output is no terminal.")
@click.option("--json", "as_json", is_flag=True, help="Print one look as JSON.")
def status_command(url: str, api_key: str | None, once: bool, as_json: bool) -> None:
    """Show what the stages of a running server do, until Ctrl-C."""
    console = Console() if sys.stdout.isatty() else Console(width=PLAIN_COLUMNS)
    if as_json:
        click.echo(msgspec.json.encode(read_view(url, api_key)))
    elif once or not console.is_terminal:
        console.print(render(read_view(url, api_key)))
    else:
        follow(console, lambda: read_view(url, api_key))


main.add_command(demo_command)
main.add_command(reference_command)
main.add_command(convert_command)
main.add_command(cache_group)
main.add_command(plan_command)
