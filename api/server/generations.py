"""The routes that generate: what happens to a request of any of them between its body and its answer."""

import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from functools import partial

import msgspec
import structlog
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive

from api.client.open_requests import TokenSource
from api.client.request_metrics import CompletionMetrics
from api.errors import DeadlineError
from api.messages.engine import not_ready, takes_requests
from api.openai.answer_stream import AnswerStream, AnswerWriter, ChoiceText, ChunkStream
from api.openai.anthropic.answer import AnthropicWriter
from api.openai.anthropic.messages import eager_tools, messages_generation, parse_messages_request
from api.openai.bodies import encode, refusal
from api.openai.chat import ChatModel, chat_generation, chat_turn, parse_chat_request
from api.openai.chat_answer import ChatWriter
from api.openai.completions import CompletionWriter, completion_generation, parse_completion_request
from api.openai.generation import GenerationRequest, build_choices
from api.openai.prompts import Check, CheckSize, refuse_other_model
from api.openai.responses.answer import ResponseWriter, response_draft
from api.openai.responses.input import called_names
from api.openai.responses.request import parse_responses_request, responses_generation
from api.server.admission import AdmissionControl
from api.server.event_stream import EventStream
from api.server.request import (
    CLIENT_LEFT,
    REQUEST_ID_HEADER,
    Bodies,
    ClientDisconnectedError,
    RequestDeadline,
    given_request_id,
    new_request_id,
    run_while_connected,
)
from api.text.served_model import ServedModel
from weights.errors import GalaxylineError

Refuse = Callable[[GalaxylineError, Mapping[str, str]], Response]
"""Writes the answer for an error, with these headers, as a route's clients know errors."""


class ParsedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request that fits the model, and what makes the format of its answer from the answer's id.

    The fields of the body are gone by then: as JSON they may be many megabytes.
    """

    generation: GenerationRequest
    answer: Callable[[str], AnswerWriter]


Parse = Callable[[bytes, Check, CheckSize], ParsedRequest]
"""Reads the body of one route's requests. May run on a thread; see `completion_generation` about the checks."""


class Generations:
    """Answers requests of all routes that generate, for one model with one engine."""

    def __init__(
        self,
        model: ServedModel,
        engine: TokenSource,
        bodies: Bodies,
        draw_seed: Callable[[], int],
        admission: AdmissionControl,
        timeout_s: float | None,
        metrics: CompletionMetrics,
    ) -> None:
        """`draw_seed` draws a seed for a prompt whose request has none. A request has `timeout_s` seconds at most."""
        self._model = model
        self._engine = engine
        self._bodies = bodies
        self._draw_seed = draw_seed
        self._admission = admission
        self._timeout_s = timeout_s
        self._metrics = metrics

    def handler(self, parse: Parse, refuse: Refuse = refusal) -> Callable[[Request], Awaitable[Response]]:
        """Makes the handler of a route whose bodies `parse` reads, and whose refusals `refuse` writes."""

        async def create(request: Request) -> Response:
            return await self._create(request, parse, refuse)

        return create

    async def _create(self, http_request: Request, parse: Parse, refuse: Refuse) -> Response:
        """The answer's id is that of the header, else of the request's own field, else a new one.

        All that is logged from here on in this task has the request's id.
        """
        given = given_request_id(http_request.headers.get(REQUEST_ID_HEADER))
        request_id = given or new_request_id()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        try:
            self._refuse_unless_ready()
            self._admission.refuse_if_full()
            deadline = RequestDeadline.of(http_request.headers, self._timeout_s)
            # Even a small body may bring a template or a grammar, whose trial takes long.
            parsed = await self._bodies.parse(http_request, partial(self._parse, parse), deadline, inline=False)
            request_id = given or given_request_id(parsed.generation.request_id) or request_id
            structlog.contextvars.bind_contextvars(request_id=request_id)
            deadline.check()
            stream = await self._open(parsed, request_id)
            headers = {REQUEST_ID_HEADER: request_id}
            if parsed.generation.streams:
                return EventStream(stream.events(), stream, headers, deadline)
            answer = await self._whole(stream, http_request.receive, deadline)
        except ClientDisconnectedError:
            return Response(status_code=CLIENT_LEFT)
        except GalaxylineError as error:
            return refuse(error, {REQUEST_ID_HEADER: request_id})
        return Response(encode(answer), 200, headers, media_type="application/json")

    def _refuse_unless_ready(self) -> None:
        state = self._engine.state
        # While a stage is replaced requests wait, so that clients see no more of it than a pause.
        if not takes_requests(state):
            raise not_ready(state)

    async def _whole(self, stream: AnswerStream, receive: Receive, deadline: RequestDeadline) -> msgspec.Struct:
        async with aclosing(stream):
            try:
                return await run_while_connected(receive, stream.whole(), deadline)
            except DeadlineError as error:
                stream.last_words(error)
                raise

    def _parse(self, parse: Parse, body: bytes, check: Check) -> ParsedRequest:
        return parse(body, check, self._admission.check_size)

    async def _open(self, parsed: ParsedRequest, request_id: str) -> AnswerStream:
        """Sends all choices to the engine, or none: a request that cannot be served fails before its answer begins."""
        request = parsed.generation
        choices = build_choices(request, self._model, self._engine.next_request_id, self._draw_seed)
        prompt_tokens = {choice.index: len(choice.prompt.tokens) for choice in choices if choice.request is not None}
        ticket = self._admission.admit(prompt_tokens)
        chunks = ChunkStream()
        try:
            for choice in choices:
                text = ChoiceText(choice, request, self._model)
                if choice.request is None:
                    chunks.add_empty_choice(text)
                else:
                    chunks.add_choice(text, self._engine.generate(choice.request))
        except GalaxylineError:
            await chunks.aclose()
            ticket.release()
            raise
        return AnswerStream(request, choices, chunks, parsed.answer(request_id), ticket, self._metrics)


def parse_chat(model: ChatModel) -> Parse:
    """Makes what reads the bodies of /v1/chat/completions."""
    served = model.served

    def parse(body: bytes, check: Check, check_size: CheckSize) -> ParsedRequest:
        request = parse_chat_request(body)
        refuse_other_model(request.model, served)
        turn = chat_turn(request, model)
        generation = chat_generation(request, turn, served, check, check_size)
        options = generation.stream_options
        return ParsedRequest(
            generation=generation,
            answer=lambda request_id: ChatWriter(request_id, served.name, int(time.time()), turn, options),
        )

    return parse


def parse_responses(model: ChatModel) -> Parse:
    """Makes what reads the bodies of /v1/responses."""
    served = model.served

    def parse(body: bytes, check: Check, check_size: CheckSize) -> ParsedRequest:
        request = parse_responses_request(body)
        refuse_other_model(request.model, served)
        generation, turn = responses_generation(request, model, check, check_size)
        draft, names = response_draft(request, generation, served.name), called_names(request.tools or [])
        return ParsedRequest(
            generation=generation,
            answer=lambda request_id: ResponseWriter(request_id, int(time.time()), draft, turn, names),
        )

    return parse


def parse_messages(model: ChatModel) -> Parse:
    """Makes what reads the bodies of /v1/messages."""
    served = model.served

    def parse(body: bytes, check: Check, check_size: CheckSize) -> ParsedRequest:
        request = parse_messages_request(body)
        refuse_other_model(request.model, served)
        generation, turn = messages_generation(request, model, check, check_size)
        eager, most = eager_tools(request.tools), request.max_tokens
        return ParsedRequest(
            generation=generation,
            answer=lambda request_id: AnthropicWriter(request_id, served.name, turn, most, eager),
        )

    return parse


def parse_completion(model: ServedModel) -> Parse:
    """Makes what reads the bodies of /v1/completions."""

    def parse(body: bytes, check: Check, check_size: CheckSize) -> ParsedRequest:
        request = parse_completion_request(body)
        refuse_other_model(request.model, model)
        generation = completion_generation(request, model, check, check_size)
        options = generation.stream_options
        return ParsedRequest(
            generation=generation,
            answer=lambda request_id: CompletionWriter(request_id, model.name, int(time.time()), options),
        )

    return parse
