"""The HTTP front end: routes, and errors in OpenAI's form."""

import random
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from api.completions import Completions
from api.error_responses import INTERNAL_ERROR, error_body, error_response, not_ready, status_body
from api.prompts import refuse_other_model
from api.protocol import CompletionRequest
from api.responses import ModelCard, ModelList, encode
from api.served_model import ServedModel
from api.token_source import TokenSource
from api.tokenization import Tokenization
from weights.errors import GalaxylineError

TOKENIZER_THREADS = 2


def create_app(model: ServedModel, engine: TokenSource, seed: int | None = None) -> FastAPI:
    """The application that serves `model` with `engine`.

    With `seed`, the seeds of requests that give none are the same in every run, in the order of their arrival.
    """
    tokenizer_threads = ThreadPoolExecutor(TOKENIZER_THREADS, "tokenizer")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        tokenizer_threads.shutdown(cancel_futures=True)

    app = FastAPI(title="galaxyline", version=version("galaxyline"), lifespan=lifespan, docs_url=None, redoc_url=None)
    completions = Completions(model, engine, tokenizer_threads, _seeds(seed))
    body = {"application/json": {"schema": CompletionRequest.model_json_schema()}}
    app.add_api_route(
        "/v1/completions",
        completions.create,
        methods=["POST"],
        response_model=None,
        openapi_extra={"requestBody": {"required": True, "content": body}},
    )
    Tokenization(model, tokenizer_threads).add_routes(app)
    _add_model_routes(app, model)
    _add_health_routes(app, engine)
    app.add_exception_handler(GalaxylineError, _galaxyline_error)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(Exception, _unexpected_error)
    return app


def _seeds(seed: int | None) -> Callable[[], int]:
    source = random.SystemRandom() if seed is None else random.Random(seed)  # noqa: S311  # no secrets are drawn
    return lambda: source.getrandbits(63)


def _add_model_routes(app: FastAPI, model: ServedModel) -> None:
    card = ModelCard(id=model.name, created=model.created, root=model.root, max_model_len=model.max_model_len)

    @app.get("/v1/models", response_model=None)
    async def models() -> Response:
        return _json(encode(ModelList(data=[card])))

    @app.get("/v1/models/{name:path}", response_model=None)
    async def model_card(name: str) -> Response:
        refuse_other_model(name, model)
        return _json(encode(card))


def _add_health_routes(app: FastAPI, engine: TokenSource) -> None:
    @app.get("/health", response_model=None)
    async def health() -> Response:
        state = engine.state
        if state.phase != "ready":
            raise not_ready(state.phase, state.detail)
        return _json(b'{"status":"ready"}')

    @app.get("/version", response_model=None)
    async def program_version() -> dict[str, str]:
        return {"version": app.version}


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")


# Starlette's type of a handler takes any exception; each of these is registered for the class it handles.
async def _galaxyline_error(_: Request, error: Exception) -> Response:
    if not isinstance(error, GalaxylineError):
        raise TypeError(f"{error!r} is no GalaxylineError")
    return error_response(error_body(error))


async def _http_exception(_: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise TypeError(f"{error!r} is no HTTPException")
    return error_response(status_body(error.status_code, f"{error.detail}"), dict(error.headers or {}))


async def _unexpected_error(_: Request, __: Exception) -> Response:
    return error_response(status_body(500, INTERNAL_ERROR))
