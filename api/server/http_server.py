"""The HTTP server of `galaxyline serve`: the application, what drains it, and uvicorn around both.

To import it takes half of the front end's time: `serve` does so while the engine starts.
"""

import asyncio
import math
from http import HTTPStatus

import structlog
import uvicorn
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from api.client.replicas import Replicas
from api.client.request_metrics import CompletionMetrics
from api.engine.options import EngineOptions
from api.openai.bodies import error_response, status_body
from api.server.access import AccessLog, RequestWatch
from api.server.admission import AdmissionControl
from api.server.app import create_app, plain_paths
from api.server.client_protocol import HttpServer, client_protocol, raise_descriptor_limit
from api.server.metrics import FrontMetrics
from api.server.monitoring import add_monitoring_routes
from api.settings.server import ServeSettings
from api.text.served_model import ServedModel

CLOSE_MARGIN_S = 5
"""The seconds that responses get to end after the engine was closed."""

REFUSED = frozenset({"/health", "/ping", "/ready", "/v1/completions"})
"""The paths that are answered with 503 while draining: those that make tokens, and those that tell whether it can."""

DRAINING = "The server is draining: it completes the requests that it has, and accepts no new ones."

log = structlog.get_logger()


class Drain:
    """An application in front of another that counts the open requests and, once begun, refuses new ones."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._begun = False
        self._open = 0
        self._empty = asyncio.Event()
        self._empty.set()

    def begin(self) -> None:
        """Answers new requests from now on with 503 and Retry-After, so that their clients go elsewhere."""
        self._begun = True
        if self._open:
            log.info("draining", open_requests=self._open)

    async def wait(self) -> None:
        """Returns when no request is open."""
        await self._empty.wait()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request, or the application's lifespan."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._begun and scope["path"] in REFUSED:
            await error_response(status_body(HTTPStatus.SERVICE_UNAVAILABLE, DRAINING))(scope, receive, send)
            return
        self._open += 1
        self._empty.clear()
        try:
            await self._app(scope, receive, send)
        finally:
            self._open -= 1
            if not self._open:
                self._empty.set()


def http_server(
    settings: ServeSettings, options: list[EngineOptions], model: ServedModel, replicas: Replicas
) -> tuple[FastAPI, Drain, HttpServer]:
    """The application, what drains it, and the server around both."""
    front, cache = settings.front, options[0].pipeline.stage.cache
    watch, completions = RequestWatch(), CompletionMetrics(cache.max_model_len)
    app = create_app(
        model,
        replicas,
        settings.engine.seed,
        admission=AdmissionControl(front.queue_limits(len(options) * cache.slots, cache.max_model_len)),
        front=front,
        probe=replicas.probe,
        metrics=completions,
    )
    front_metrics = FrontMetrics(watch=watch, completions=completions, cache_config=cache_config(options[0]))
    add_monitoring_routes(app, model.name, replicas.engines, front_metrics)
    drain = Drain(app)
    shared = CORSMiddleware(drain, **front.cors.middleware_options) if front.cors.allowed_origins else drain
    config = uvicorn.Config(
        AccessLog(shared, watch, plain_paths(app), front.root_path or ""),
        http=client_protocol(front.client_timeout_s, watch, raise_descriptor_limit()),
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=CLOSE_MARGIN_S,
        timeout_keep_alive=math.ceil(front.timeout_keep_alive_s),
        **({} if front.tls is None else front.tls.uvicorn_options),
    )
    return app, drain, HttpServer(config, front.client_timeout_s)


def cache_config(options: EngineOptions) -> dict[str, str]:
    """The KV cache as vLLM's `cache_config_info` has it in its labels."""
    stage = options.pipeline.stage
    return {
        "block_size": str(stage.cache.block_size),
        "cache_dtype": stage.dtype,
        "enable_prefix_caching": str(options.schedule.enable_prefix_caching),
        "num_gpu_blocks": str(stage.cache.blocks * stage.cache.pools),
    }
