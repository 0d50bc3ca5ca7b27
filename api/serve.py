"""`galaxyline serve`: the engine, and the HTTP server in front of it."""

import asyncio
import contextlib
import json
import socket
from collections.abc import Iterator

import click
import msgspec
import uvicorn
from rich.console import Console

from api.app import create_app
from api.engine_client import EngineClient
from api.engine_options import EngineOptions
from api.generation_config import MODELS_OWN
from api.listener import listen, url
from api.model_source import ModelSource, check_model_files
from api.monitoring import add_monitoring_routes
from api.served_model import DEFAULT_MAX_LOGPROBS, ServedModel
from api.settings import ENGINE_MARGIN_S, EngineSettings
from api.signals import on_stop_signal
from api.start_progress import StartProgress
from weights.model_config import ModelConfig

CLOSE_MARGIN_S = 5
"""What responses get to end in after the engine has been closed under them."""


class ServeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The options of `serve`; port 0 takes any free one. With the engine's seed, requests that bring none get the same
    ones in every run. `max_logprobs` and `generation_config` are ServedModel's."""

    engine: EngineSettings
    source: ModelSource
    host: str
    port: int
    shutdown_timeout_s: float
    max_logprobs: int = DEFAULT_MAX_LOGPROBS
    generation_config: str = MODELS_OWN


async def serve(settings: ServeSettings) -> None:
    """Serves until SIGINT or SIGTERM; the open requests then have `shutdown_timeout_s` to end.

    Raises GalaxylineError where the server cannot start.
    """
    check_model_files(settings.source, needs_weights=settings.engine.load_format == "auto")
    config = ModelConfig.from_file(settings.source.path / "config.json")
    options = settings.engine.engine_options(settings.source, config)
    model = ServedModel.load(
        settings.source,
        config,
        options.pipeline.stage.cache.max_model_len,
        settings.max_logprobs,
        settings.generation_config,
    )
    with contextlib.closing(listen(settings.host, settings.port)) as listener:
        stop = asyncio.Event()
        with on_stop_signal(lambda _: stop.set()):
            await _serve(settings, options, model, listener, stop)


async def _serve(
    settings: ServeSettings, options: EngineOptions, model: ServedModel, listener: socket.socket, stop: asyncio.Event
) -> None:
    progress = StartProgress(Console(stderr=True))
    async with EngineClient.start(options, progress.update) as engine:
        app = create_app(model, engine, settings.engine.seed)
        add_monitoring_routes(app, model.name, engine)
        server = _Server(
            uvicorn.Config(
                app,
                http="httptools",
                ws="none",
                lifespan="on",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(settings.shutdown_timeout_s) + CLOSE_MARGIN_S,
            )
        )
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            with progress.showing():
                ready = asyncio.create_task(engine.wait_ready(settings.engine.start_timeout_s + ENGINE_MARGIN_S))
                await _wait_for(stop, ready)
            if ready.done():
                ready.result()
                click.echo(_welcome(url(listener), model, options))
                await _wait_for(stop, serving)
            ready.cancel()
        finally:
            server.should_exit = True
            stop.clear()
            await _wait_for(stop, serving, timeout_s=settings.shutdown_timeout_s)
            # Requests that are still open end with the engine's error, not in silence.
            await engine.close()
            await serving


async def _wait_for(stop: asyncio.Event, task: asyncio.Task[None], timeout_s: float | None = None) -> None:
    """Returns when `task` is done, `stop` is set or the time is up, whichever comes first."""
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({stopping, task}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()


class _Server(uvicorn.Server):
    """Leaves signals to `serve`, which has an engine to end before the process may go."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _welcome(base: str, model: ServedModel, options: EngineOptions) -> str:
    specs = options.pipeline.specs
    body = {"model": model.name, "prompt": "San Francisco is a", "max_tokens": 32, "temperature": 0}
    fields = json.dumps({**body, "top_p": 0.9, "top_k": 10}, ensure_ascii=False)[1:-1].replace("'", "'\\''")
    return (
        f"Ready: {model.name} on {base}, {specs[-1].end_layer} layers over {len(specs)} "
        f"{'stage' if len(specs) == 1 else 'stages'}. Try it:\n\n"
        f"curl {base}/v1/completions \\\n"
        '  -H "Content-Type: application/json" \\\n'
        f"  -d '{{ {fields} }}'\n"
    )
