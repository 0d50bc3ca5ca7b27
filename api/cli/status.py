"""`galaxyline status`: the stages of a running server, as a table that follows them or as JSON."""

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from urllib.parse import urlsplit

import click
import msgspec
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from api.cli.options import DEFAULT_IN_WORDS
from api.cli.parameters import result_console
from api.errors import EngineError, NoServerError, OptionError
from api.messages.pipeline_view import EngineView, PipelineView, StageView
from api.openai.responses import ErrorBody
from api.settings.server import KEY_VARIABLES, KEYS_IN_WORDS

ANSWER_TIMEOUT_S = 10.0
"""How long the server may take to answer; it gives its engine half as long."""

REFRESH_S = 1.0
MIB = 1 << 20

STYLES = {"running": "green", "ready": "green", "blocked": "yellow", "silent": "red", "dead": "red", "failed": "red"}


@click.command("status")
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The server's address.")
@click.option(
    "--api-key",
    envvar=KEY_VARIABLES,
    help=f"A key of the server, where it wants one.{DEFAULT_IN_WORDS.format(KEYS_IN_WORDS)}",
)
@click.option("--once", is_flag=True, help="Print one look and end; so it is where the output is not a terminal.")
@click.option("--json", "as_json", is_flag=True, help="Print one look as JSON.")
def status_command(url: str, api_key: str | None, once: bool, as_json: bool) -> None:
    """Show what the stages of a running server do, until Ctrl-C."""
    console = result_console()
    if as_json:
        click.echo(msgspec.json.encode(read_view(url, api_key)))
    elif once or not console.is_terminal:
        console.print(render(read_view(url, api_key)))
    else:
        follow(console, lambda: read_view(url, api_key))


def read_view(url: str, api_key: str | None = None) -> PipelineView:
    """Gets the state of the pipelines from the server at `url`, with a key where it wants one.

    Raises OptionError where `url` is not an HTTP address, NoServerError where no galaxyline server answers there, and
    EngineError with the server's sentence where it answers with an error.
    """
    if not _is_http(url):
        raise OptionError(f"--url {url!r} is not an HTTP address: write it like http://127.0.0.1:8000.")
    # A server that is named by its address is not to be reached through a proxy for the web.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(_request(url, api_key), timeout=ANSWER_TIMEOUT_S) as response:
            return msgspec.json.decode(response.read(), type=PipelineView)
    except urllib.error.HTTPError as error:
        raise _refusal(url, error) from error
    except msgspec.DecodeError as error:
        raise _other_server(url) from error
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        raise NoServerError(f"No server answers at {url}: start one, or give its address with --url.") from error


def _request(url: str, api_key: str | None) -> urllib.request.Request:
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    return urllib.request.Request(f"{url.rstrip('/')}/pipeline", headers=headers)  # noqa: S310  # _is_http has looked


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _refusal(url: str, error: urllib.error.HTTPError) -> EngineError | NoServerError:
    try:
        body = msgspec.json.decode(error.read(), type=ErrorBody)
    except msgspec.DecodeError:
        return _other_server(url)
    return EngineError(f"The server at {url} answers: {body.error.message}")


def _other_server(url: str) -> NoServerError:
    return NoServerError(f"What answers at {url} is not a galaxyline server: give the address of one with --url.")


def follow(console: Console, read: Callable[[], PipelineView], sleep: Callable[[float], None] = time.sleep) -> None:
    """Shows what `read` returns, every second, until Ctrl-C. Raises what `read` raises."""
    with Live(render(read()), console=console, auto_refresh=False) as live:
        try:
            while True:
                sleep(REFRESH_S)
                live.update(render(read()), refresh=True)
        except KeyboardInterrupt:
            return


def render(view: PipelineView) -> Group:
    """A view as it is shown."""
    parts: list[Text | Table]
    if len(view.replicas) == 1:
        parts = _engine_lines(view.model, view.phase, view.detail, view.engine)
    else:
        parts = [_head(view.model, view.phase)]
        for replica in view.replicas:
            parts += _engine_lines(f"replica {replica.replica}", replica.phase, replica.detail, replica.engine)
    if view.engine is not None:
        parts.append(_table(view.stages, shows_replica=len(view.replicas) > 1))
    return Group(*parts)


def _engine_lines(name: str, phase: str, detail: str, engine: EngineView | None) -> list[Text | Table]:
    head = _head(name, phase)
    if detail:
        head.append(f". {detail}")
    return [head] if engine is None else [head, _engine_line(engine)]


def _head(name: str, phase: str) -> Text:
    return Text.assemble((name, "bold"), ": ", (phase, STYLES.get(phase, "yellow")))


def _engine_line(engine: EngineView) -> Text:
    return Text(
        f"{engine.requests_running} requests running, {engine.requests_waiting} waiting, "
        f"{engine.preemptions} preemptions; {engine.steps_in_flight} of {engine.microbatches} microbatches in flight; "
        f"{engine.slots_used} of {engine.slots} slots, {engine.kv_cache_blocks_used} of {engine.kv_cache_blocks} KV "
        f"blocks; epoch {'-' if engine.epoch is None else engine.epoch}, engine pid {engine.pid}"
    )


def _table(stages: list[StageView], *, shows_replica: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in (*(["replica"] if shows_replica else []), "stage", "host", "rows", "layers"):
        table.add_column(name, no_wrap=True)
    table.add_column("state")
    for name in ("steps", "busy", "restarts", "memory", "pid"):
        table.add_column(name, justify="right", no_wrap=True)
    for stage in stages:
        table.add_row(
            *([str(stage.replica)] if shows_replica else []),
            str(stage.stage),
            stage.host or "-",
            "-" if stage.rows is None else ",".join(map(str, stage.rows)),
            f"{stage.first_layer}-{stage.end_layer - 1}",
            _state(stage),
            str(stage.steps_done),
            f"{stage.busy_share:.0%}",
            str(stage.restarts),
            "-" if stage.resident_bytes is None else f"{stage.resident_bytes / MIB:.0f} MiB",
            "-" if stage.pid is None else str(stage.pid),
        )
    return table


def _state(stage: StageView) -> Text:
    text = str(stage.state)
    if stage.state == "loading":
        text += f", {stage.layers_done} of {stage.end_layer - stage.first_layer} layers"
    if stage.step_id is not None:
        text += f", step {stage.step_id} for {stage.step_seconds:.1f} s"
    return Text(f"{text}: {stage.detail}" if stage.detail else text, style=STYLES.get(stage.state, ""))
