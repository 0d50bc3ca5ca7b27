"""`galaxyline serve`: the HTTP server, its engines, and the drain at its end."""

import asyncio
import contextlib
import errno
import gc
import json
import signal
import socket
from typing import TYPE_CHECKING

import click
import structlog
from rich.console import Console

from api.client.progress import StartProgress
from api.client.replicas import Replicas
from api.engine.options import EngineOptions
from api.engine.signals import StopSignals, on_stop_signal
from api.errors import OptionError
from api.settings.engine import ENGINE_MARGIN_S
from api.settings.replicas import replica_options
from api.settings.server import KEY_VARIABLES, FrontSettings, ServeSettings
from api.text.model_source import check_model_files
from api.text.served_model import ServedModel
from weights.model_config import ModelConfig

if TYPE_CHECKING:
    from api.server.http_server import Drain

BACKLOG = 2048
log = structlog.get_logger()


def listen(host: str, port: int) -> socket.socket:
    """Opens a listening socket on `host` and `port`; port 0 takes any free one.

    Raises OptionError where the port is in use, or the address does not belong to this host.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise OptionError(f"--host {host!r} is not an address: {error.strerror}.") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # Without this, the port could still be lost to another server while the stages load.
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise OptionError(f"Port {port} on {host} is in use: choose another one with --port.") from error
        raise OptionError(f"Cannot listen on {host} port {port}: {error.strerror}.") from error
    listener.setblocking(False)
    return listener


def url(listener: socket.socket) -> str:
    """The URL under which a client on this host reaches the listener."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 # nosec B104 # not bound
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve(settings: ServeSettings) -> None:
    """Serves until SIGINT or SIGTERM; the open requests then have `shutdown_timeout_s` to end, or until a second one.

    Returns after SIGTERM where all requests could end, and raises StoppedError after any other signal. Raises
    GalaxylineError where the server cannot start, and the engine's error where it fails for good: all requests have
    ended with it by then.
    """
    check_model_files(settings.source, needs_weights=settings.engine.needs_weights)
    config = ModelConfig.from_file(settings.source.path / "config.json")
    options = replica_options(settings.engine, settings.source, config, settings.replicas)
    model = ServedModel.load(
        settings.source,
        config,
        options[0].pipeline.stage.cache.max_model_len,
        settings.max_logprobs,
        settings.generation_config,
    )
    options = [one.with_vocabulary(model.vocabulary) for one in options]
    with contextlib.ExitStack() as closing:
        listener = closing.enter_context(contextlib.closing(listen(settings.host, settings.port)))
        if model.grammars is not None:
            closing.callback(model.grammars.close)
        signals = StopSignals()
        with on_stop_signal(signals.note):
            await _serve(settings, options, model, listener, signals)


async def _serve(
    settings: ServeSettings,
    options: list[EngineOptions],
    model: ServedModel,
    listener: socket.socket,
    signals: StopSignals,
) -> None:
    progress = StartProgress(Console(stderr=True), settings.replicas)
    async with Replicas.open(options, progress.update) as replicas, contextlib.AsyncExitStack() as showing:
        showing.enter_context(progress.showing())
        ready = asyncio.create_task(replicas.start(settings.engine.cluster.start_timeout_s + ENGINE_MARGIN_S))
        # The engine starts meanwhile.
        await asyncio.to_thread(_import_http_server)
        from api.server.http_server import http_server  # noqa: PLC0415 - imported just now
        from api.server.monitoring import STOPPING  # noqa: PLC0415

        app, drain, server = http_server(settings, options, model, replicas)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        failing: asyncio.Task[None] | None = None
        try:
            await _wait_for(signals.asked, ready)
            await showing.aclose()
            # A signal may have reached the engine's processes too, so after one their result means nothing.
            if ready.done() and not signals.asked.is_set():
                ready.result()
                # The objects that exist by now stay to the end, so the cycle collector need not look at them with
                # every request, which took a tenth of the front end's time.
                gc.collect()
                gc.freeze()
                has_keys = settings.front.api_keys is not None
                click.echo(_welcome(_address(listener, settings.front), model, options, has_keys=has_keys))
                failing = asyncio.create_task(replicas.wait_failed())
                await _wait_for(signals.asked, serving, failing)
                failing.cancel()
            ready.cancel()
        finally:
            setattr(app.state, STOPPING, True)
            is_drained = await _end(drain, replicas, signals, settings.shutdown_timeout_s)
            server.should_exit = True
            await serving
        if signals.first == signal.SIGTERM and failing is not None and is_drained:
            return  # A supervisor has asked for it, and got all of it.
        if signals.asked.is_set():
            raise signals.error
        if failing is not None and not failing.cancelled():
            # No request can be served any more: the error ends this process, so that its supervisor starts a new one.
            failing.result()


async def _end(drain: "Drain", replicas: Replicas, signals: StopSignals, drain_s: float) -> bool:
    """Lets open requests end for `drain_s` seconds, then ends the engines; another signal ends either wait.

    Returns whether all requests could end.
    """
    drain.begin()
    drained = asyncio.create_task(drain.wait())
    await _wait_for(signals.forced, drained, timeout_s=drain_s)
    is_drained = drained.done()
    # Requests that are still open end with the engine's error rather than without a word.
    closing = asyncio.create_task(replicas.close())
    await _wait_for(signals.forced, closing)
    replicas.kill()
    await closing
    return is_drained


def _import_http_server() -> None:
    import api.server.http_server  # noqa: F401, PLC0415 - see there


async def _wait_for(stop: asyncio.Event, *tasks: asyncio.Task[None], timeout_s: float | None = None) -> None:
    """Returns when one of the `tasks` is done, `stop` is set or the time is up, whichever comes first."""
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({stopping, *tasks}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()


def _address(listener: socket.socket, front: FrontSettings) -> str:
    address = url(listener)
    return address if front.tls is None else address.replace("http:", "https:", 1)


def _welcome(base: str, model: ServedModel, options: list[EngineOptions], *, has_keys: bool) -> str:
    specs = options[0].pipeline.specs
    replicas = f"{len(options)} replicas of " if len(options) > 1 else ""
    body = {"model": model.name, "prompt": "San Francisco is a", "max_tokens": 32, "temperature": 0}
    # A variable in place of the key: what is printed ends up in logs.
    key = f'  -H "Authorization: Bearer ${KEY_VARIABLES[0]}" \\\n' if has_keys else ""
    fields = json.dumps({**body, "top_p": 0.9, "top_k": 10}, ensure_ascii=False)[1:-1].replace("'", "'\\''")
    return (
        f"Ready: {model.name} on {base}, {specs[-1].end_layer} layers over {replicas}{len(specs)} "
        f"{'stage' if len(specs) == 1 else 'stages'}. Try it:\n\n"
        f"curl {base}/v1/completions \\\n"
        '  -H "Content-Type: application/json" \\\n'
        f"{key}"
        f"  -d '{{ {fields} }}'\n"
    )
