"""The HTTP front end: routes, and errors in OpenAI's form."""

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from http import HTTPStatus

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from api.client.open_requests import TokenSource
from api.errors import EngineError, NotReadyError
from api.messages.engine import not_ready, takes_requests
from api.openai.choices import refuse_other_model
from api.openai.protocol import CompletionRequest
from api.openai.responses import (
    INTERNAL_ERROR,
    ModelCard,
    ModelList,
    Status,
    Version,
    encode,
    error_response,
    refusal,
    status_body,
)
from api.server.admission import AdmissionControl
from api.server.completions import Completions
from api.server.openapi import DescribedApp, answers_of, body_of, completion_answers, timeout_header
from api.server.tokenization import DetokenizeRequest, Tokenization, TokenizeRequest
from api.settings.server import ApiKeys, QueueLimits
from api.text.served_model import ServedModel
from weights.errors import GalaxylineError
from weights.release import VERSION

OPEN_PATHS = frozenset({"/health", "/live", "/ready"})

"""The paths that need no key, for orchestrators: their answers have nothing but whether the server works."""

UNAUTHORIZED = "No valid API key came with the request: send the header Authorization: Bearer KEY."


class Authentication:
    """An application in front of another that answers 401 to requests without a valid key, but for OPEN_PATHS."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request, or the application's lifespan."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._keys.accepts(_bearer(scope)):
            await self._app(scope, receive, send)
            return
        body = status_body(HTTPStatus.UNAUTHORIZED, UNAUTHORIZED)
        await error_response(body, {"www-authenticate": "Bearer"})(scope, receive, send)


def _bearer(scope: Scope) -> bytes:
    """The key of a request; empty where it has none."""
    header: bytes = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    scheme, _, key = header.partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else b""


TOKENIZER_THREADS = 2

DEFAULT_SLOTS = 256

Probe = Callable[[], Awaitable[object]]

"""Returns when the engine answers; raises EngineError where it does not."""


class Health:
    """The routes /health, /ready and /live of one engine."""

    def __init__(self, engine: TokenSource, probe: Probe | None = None) -> None:
        """`probe` queries the engine, which answers at once where it works."""
        self._engine = engine
        self._probe = probe

    async def health(self) -> Response:
        """Answers 200 where a token can be made now.

        Raises NotReadyError while stages load or are replaced, and where the engine failed or does not answer.
        """
        state = self._engine.state
        if state.phase != "ready":
            raise not_ready(state)
        if self._probe is not None:
            try:
                await self._probe()
            except EngineError as error:
                public = f"No token can be made: {error.public}" if error.public else "No token can be made."
                raise NotReadyError(f"No token can be made: {error}", public=public) from error
        return _status("ready")

    async def ready(self) -> Response:
        """Answers 200 where requests are accepted, also while they wait for a stage. Raises NotReadyError elsewhere."""
        state = self._engine.state
        if not takes_requests(state):
            raise not_ready(state)
        return _status(state.phase)

    async def live(self) -> Response:
        """Answers 200 as long as this process answers, whatever its engine does."""
        return _status("live")


def _status(status: str) -> Response:
    return Response(encode(Status(status=status)), media_type="application/json")


def create_app(
    model: ServedModel,
    engine: TokenSource,
    seed: int | None = None,
    *,
    admission: AdmissionControl | None = None,
    request_timeout_s: float | None = None,
    probe: Probe | None = None,
) -> FastAPI:
    """The application that serves `model` with `engine`.

    With `seed`, the seeds of requests that give none are the same in every run, in the order of their arrival.
    `admission` bounds what waits, by default as for an engine of DEFAULT_SLOTS. A request has `request_timeout_s`
    seconds at most. `probe` finds out whether the engine answers: see `Health`.
    """
    tokenizer_threads = ThreadPoolExecutor(TOKENIZER_THREADS, "tokenizer")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        tokenizer_threads.shutdown(cancel_futures=True)

    app = DescribedApp(title="galaxyline", version=VERSION, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.bodies = (CompletionRequest, TokenizeRequest, DetokenizeRequest)
    limits = QueueLimits.of(DEFAULT_SLOTS, model.max_model_len)
    completions = Completions(
        model, engine, tokenizer_threads, _seeds(seed), admission or AdmissionControl(limits), request_timeout_s
    )
    app.add_api_route(
        "/v1/completions",
        completions.create,
        methods=["POST"],
        response_model=None,
        response_class=Response,
        responses=completion_answers(),
        openapi_extra={**body_of(CompletionRequest), "parameters": [timeout_header()]},
    )
    Tokenization(model, tokenizer_threads).add_routes(app)
    _add_model_routes(app, model)
    _add_health_routes(app, Health(engine, probe))
    app.add_exception_handler(GalaxylineError, _galaxyline_error)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(Exception, _unexpected_error)
    return app


def _seeds(seed: int | None) -> Callable[[], int]:
    source = random.SystemRandom() if seed is None else random.Random(seed)  # noqa: S311  # no secrets are drawn
    return lambda: source.getrandbits(63)


def _add_model_routes(app: FastAPI, model: ServedModel) -> None:
    card = ModelCard(id=model.name, created=model.created, root=model.root, max_model_len=model.max_model_len)

    @app.get("/v1/models", response_model=None, response_class=Response, responses=answers_of(ModelList))
    async def models() -> Response:
        return _json(encode(ModelList(data=[card])))

    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}

    @app.get(
        "/v1/models/{name:path}",
        response_model=None,
        response_class=Response,
        responses=answers_of(ModelCard, 404),
        openapi_extra={"parameters": [name]},
    )
    async def model_card(request: Request) -> Response:
        refuse_other_model(request.path_params["name"], model)
        return _json(encode(card))


def _add_health_routes(app: FastAPI, health: Health) -> None:
    for path, handler, errors in (
        ("/health", health.health, [503]),
        ("/ready", health.ready, [503]),
        ("/live", health.live, []),
    ):
        app.add_api_route(
            path, handler, response_model=None, response_class=Response, responses=answers_of(Status, *errors)
        )

    @app.get("/version", response_model=None, response_class=Response, responses=answers_of(Version))
    async def program_version() -> Response:
        return _json(encode(Version(version=app.version)))


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")


# Starlette's type of a handler takes any exception; each of these is registered for the class it handles.
async def _galaxyline_error(_: Request, error: Exception) -> Response:
    if not isinstance(error, GalaxylineError):
        raise TypeError(f"{error!r} is not a GalaxylineError")
    return refusal(error, {})


async def _http_exception(_: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise TypeError(f"{error!r} is not an HTTPException")
    return error_response(status_body(error.status_code, f"{error.detail}"), dict(error.headers or {}))


async def _unexpected_error(_: Request, __: Exception) -> Response:
    return error_response(status_body(500, INTERNAL_ERROR))
