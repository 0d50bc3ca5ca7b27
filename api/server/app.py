"""The HTTP front end: routes, and errors in OpenAI's form."""

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus

from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match, Route

from api.client.open_requests import TokenSource
from api.client.request_metrics import CompletionMetrics
from api.messages.engine import not_ready, takes_requests
from api.openai.anthropic.answer import AnthropicMessage, TokenCount
from api.openai.anthropic.errors import MESSAGES_PATH, AnthropicError, anthropic_refusal, error_writer
from api.openai.anthropic.messages import CountTokensRequest, MessagesRequest
from api.openai.bodies import (
    INTERNAL_ERROR,
    ModelCard,
    ModelList,
    encode,
    error_response,
    refusal,
    status_body,
)
from api.openai.chat import ChatModel, ChatRequest
from api.openai.chat_answer import ChatCompletion
from api.openai.completions import Completion, CompletionRequest
from api.openai.prompts import refuse_other_model
from api.openai.responses.answer import ResponseObject
from api.openai.responses.request import ResponsesRequest
from api.server.access import Authentication
from api.server.admission import AdmissionControl
from api.server.generations import Generations, parse_chat, parse_completion, parse_messages, parse_responses
from api.server.health import Health, Probe
from api.server.openapi import (
    BODY_ERRORS,
    DescribedApp,
    Description,
    add_docs_page,
    add_route,
    answers_of,
    body_of,
    generation_answers,
    timeout_header,
)
from api.server.request import Bodies
from api.server.token_counts import TokenCounts
from api.server.tokenization import DetokenizeRequest, Tokenization, TokenizeRequest
from api.settings.server import FrontSettings, QueueLimits
from api.text.served_model import ServedModel
from weights.errors import GalaxylineError
from weights.release import VERSION

DEFAULT_SLOTS = 256

PATH_CHARACTERS_MAX = 100
"""The most of a path that an answer repeats."""


def create_app(
    model: ServedModel,
    engine: TokenSource,
    seed: int | None = None,
    *,
    admission: AdmissionControl | None = None,
    front: FrontSettings | None = None,
    probe: Probe | None = None,
    metrics: CompletionMetrics | None = None,
) -> FastAPI:
    """The application that serves `model` with `engine`.

    With `seed`, the seeds of requests that give none are the same in every run, in the order of their arrival.
    `admission` bounds what waits, by default as for an engine of DEFAULT_SLOTS. Of `front`, the keys, the seconds of a
    request and the options of chat count here. `probe` finds out whether the engine answers: see `Health`. Completions
    that have ended go into `metrics`. Raises CheckpointError where the chat template cannot be used.
    """
    front = front or FrontSettings()
    bodies = Bodies()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        bodies.close()

    app = DescribedApp(
        title="galaxyline",
        version=VERSION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        # A redirect would go to whatever host the client names.
        redirect_slashes=False,
    )
    app.bodies = (
        CompletionRequest,
        ChatRequest,
        ResponsesRequest,
        MessagesRequest,
        CountTokensRequest,
        TokenizeRequest,
        DetokenizeRequest,
    )
    admission = admission or AdmissionControl(QueueLimits.of(DEFAULT_SLOTS, model.max_model_len))
    chat_model = ChatModel.of(model, front.chat)
    generations = Generations(
        model, engine, bodies, _seeds(seed), admission, front.request_timeout_s, metrics or CompletionMetrics()
    )
    _add_generation_routes(app, chat_model, generations)
    counted = answers_of(TokenCount, *BODY_ERRORS, 429, error=AnthropicError)
    summary = "Counts the tokens of a conversation, for clients of Anthropic."
    count, more = TokenCounts(chat_model, bodies).count, body_of(CountTokensRequest)
    add_route(app, f"{MESSAGES_PATH}/count_tokens", count, counted, summary, method="POST", more=more)
    Tokenization(chat_model, bodies).add_routes(app)
    _add_model_routes(app, model, engine)
    Health(engine, admission, probe).add_routes(app)
    add_docs_page(app)
    if front.api_keys is not None:
        app.add_middleware(Authentication, keys=front.api_keys)
        app.guards = front.api_keys.guard
    app.add_exception_handler(GalaxylineError, _galaxyline_error)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(Exception, _unexpected_error)
    return app


def plain_paths(app: FastAPI) -> frozenset[str]:
    """The paths of the routes that have no parameter."""
    return frozenset(route.path for route in _routes(app) if "{" not in route.path)


def _routes(app: FastAPI) -> list[Route]:
    return [route for route in app.routes if isinstance(route, Route)]


def _seeds(seed: int | None) -> Callable[[], int]:
    source = random.SystemRandom() if seed is None else random.Random(seed)  # noqa: S311  # no secrets are drawn
    return lambda: source.getrandbits(63)


def _add_generation_routes(app: FastAPI, model: ChatModel, generations: Generations) -> None:
    def more(body: type[BaseModel]) -> Description:
        return {**body_of(body), "parameters": [timeout_header()]}

    add_route(
        app,
        "/v1/completions",
        generations.handler(parse_completion(model.served)),
        generation_answers(Completion, "a Completion or an ErrorBody as JSON; the last one is [DONE]"),
        "Completes prompts, in one answer or as a stream of server-sent events.",
        method="POST",
        more=more(CompletionRequest),
    )
    add_route(
        app,
        "/v1/chat/completions",
        generations.handler(parse_chat(model)),
        generation_answers(ChatCompletion, "a ChatCompletionChunk or an ErrorBody as JSON; the last one is [DONE]"),
        "Answers a conversation, with tools and thoughts, in one answer or as a stream of server-sent events.",
        method="POST",
        more=more(ChatRequest),
    )
    add_route(
        app,
        "/v1/responses",
        generations.handler(parse_responses(model)),
        generation_answers(ResponseObject, "of the type that its name says, from response.created on"),
        "Answers a conversation in the form of OpenAI's Responses API, without storing anything.",
        method="POST",
        more=more(ResponsesRequest),
    )
    add_route(
        app,
        MESSAGES_PATH,
        generations.handler(parse_messages(model), anthropic_refusal),
        generation_answers(
            AnthropicMessage, "of the type that its name says, from message_start to message_stop", AnthropicError
        ),
        "Answers a conversation in the form of Anthropic's Messages API.",
        method="POST",
        more=more(MessagesRequest),
    )


def _add_model_routes(app: FastAPI, model: ServedModel, engine: TokenSource) -> None:
    cards = {
        name: ModelCard(id=name, created=model.created, root=model.root, max_model_len=model.max_model_len)
        for name in model.names
    }

    def refuse_unless_ready() -> None:
        # Clients take a list of models as a sign that they can be asked.
        if not takes_requests(engine.state):
            raise not_ready(engine.state)

    async def models() -> Response:
        refuse_unless_ready()
        return _json(encode(ModelList(data=list(cards.values()))))

    async def model_card(request: Request) -> Response:
        name = request.path_params["name"]
        refuse_other_model(name, model)
        refuse_unless_ready()
        return _json(encode(cards[name]))

    summary = "The names that the model is served under."
    add_route(app, "/v1/models", models, answers_of(ModelList, 503), summary)
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    answers = answers_of(ModelCard, 404, 503)
    summary = "One of the names, with the model's root and length."
    add_route(app, "/v1/models/{name:path}", model_card, answers, summary, more={"parameters": [name]})


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")


# Starlette's type of a handler takes any exception; each of these is registered for the class it handles.
async def _galaxyline_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, GalaxylineError):
        raise TypeError(f"{error!r} is not a GalaxylineError")
    return refusal(error, {}, error_writer(request.scope["path"]))


async def _http_exception(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise TypeError(f"{error!r} is not an HTTPException")
    message, headers = f"{error.detail}", dict(error.headers or {})
    write = error_writer(request.scope["path"])
    path = request.scope["path"][:PATH_CHARACTERS_MAX]
    if error.status_code == HTTPStatus.NOT_FOUND:
        message = f"This server has no {path}. It serves: {_served(request.app)}."
    elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = _methods(request)
        message = f"{path} takes {' or '.join(allowed)}, not {request.method}."
        headers = {"allow": ", ".join(allowed)}
    return error_response(status_body(error.status_code, message), headers, write)


def _served(app: FastAPI) -> str:
    """The routes that are for users, the most wanted first."""
    return ", ".join(
        f"{min(route.methods or {'GET'})} {route.path}" for route in _routes(app) if route.include_in_schema
    )


def _methods(request: Request) -> list[str]:
    """The methods of all routes that have the path of a request."""
    scope = {**request.scope, "method": ""}
    matching = [route for route in _routes(request.app) if route.matches(scope)[0] is not Match.NONE]
    return sorted({method for route in matching for method in route.methods or ()})


async def _unexpected_error(request: Request, _: Exception) -> Response:
    return error_response(status_body(500, INTERNAL_ERROR), write=error_writer(request.scope["path"]))
