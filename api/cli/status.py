"""`galaxyline status`: the stages of a running server, as a table that follows them or as JSON."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import click
import msgspec

from api.cli.parameters import LoggedCommand, begin_work, result_console
from api.cli.server import Server, server_key, server_url
from api.errors import NoServerError
from api.messages.pipeline_view import PipelineView

if TYPE_CHECKING:
    from rich.console import Console

REFRESH_S = 1.0


@click.command("status", cls=LoggedCommand)
@server_url
@server_key
@click.option("--once", is_flag=True, help="Print one look and end; so it is where the output is not a terminal.")
@click.option("--json", "as_json", is_flag=True, help="Print one look as JSON.")
def status_command(url: str, api_key: str | None, once: bool, as_json: bool) -> None:
    """Show what the stages of a running server do, until Ctrl-C."""
    if as_json:
        click.echo(msgspec.json.encode(read_view(url, api_key)))
        return
    from api.cli.tables import pipeline_text  # noqa: PLC0415 - imports rich

    console = result_console()
    if once or not console.is_terminal:
        console.print(pipeline_text(read_view(url, api_key)))
    else:
        follow(console, lambda: read_view(url, api_key))


def read_view(url: str, api_key: str | None = None) -> PipelineView:
    """Gets the state of the pipelines from the server at `url`, with a key where it wants one.

    Raises OptionError where `url` is not an HTTP address or the key is refused, NoServerError where no galaxyline
    server answers there, and EngineError with the server's sentence where it answers with an error.
    """
    return Server(url, api_key).get("/pipeline", PipelineView)


def follow(console: "Console", read: Callable[[], PipelineView], sleep: Callable[[float], None] = time.sleep) -> None:
    """Shows what `read` returns, every second, until Ctrl-C, or until a server that was stopping is gone.

    Raises what `read` raises otherwise.
    """
    from rich.live import Live  # noqa: PLC0415 - --help does without

    from api.cli.tables import pipeline_text  # noqa: PLC0415

    view = read()
    begin_work()
    with Live(pipeline_text(view), console=console, auto_refresh=False) as live:
        try:
            while True:
                sleep(REFRESH_S)
                view = read()
                live.update(pipeline_text(view), refresh=True)
        except KeyboardInterrupt:
            return
        except NoServerError:
            if view.phase != "stopping":
                raise
    console.print("The server has stopped.")
