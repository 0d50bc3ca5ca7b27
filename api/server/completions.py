"""The route POST /v1/completions."""

from collections.abc import Callable
from contextlib import aclosing

import msgspec
import structlog
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive

from api.client.open_requests import TokenSource
from api.client.request_metrics import CompletionMetrics
from api.errors import DeadlineError
from api.messages.engine import not_ready, takes_requests
from api.openai.choices import Prompt, build_choices, read_prompts, refuse_other_model, sampling_params
from api.openai.completion_stream import ChunkStream, CompletionStream, CompletionText
from api.openai.protocol import CompletionRequest, parse_completion_request
from api.openai.responses import Completion, encode, refusal
from api.server.admission import AdmissionControl
from api.server.event_stream import EventStream
from api.server.request import (
    CLIENT_LEFT,
    REQUEST_ID_HEADER,
    Bodies,
    Check,
    ClientDisconnectedError,
    RequestDeadline,
    given_request_id,
    new_request_id,
    run_while_connected,
)
from api.text.served_model import ServedModel
from stages.step import SamplingParams
from weights.errors import GalaxylineError


class ParsedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request that fits the model: its fields, its prompts as tokens, and how its tokens are to be drawn.

    `request_id` is the one in its body. The fields in `request` that have become something else are empty.
    """

    request: CompletionRequest
    request_id: str | None
    prompts: list[Prompt]
    sampling: SamplingParams


class Completions:
    """Answers completion requests for one model with one engine."""

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

    async def create(self, http_request: Request) -> Response:
        """The route's handler. The answer's id is that of the header, else of the request's own field, else a new one.

        All that is logged from here on in this task has the request's id.
        """
        given = given_request_id(http_request.headers.get(REQUEST_ID_HEADER))
        request_id = given or new_request_id()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        try:
            self._refuse_unless_ready()
            self._admission.refuse_if_full()
            deadline = RequestDeadline.of(http_request.headers, self._timeout_s)
            parsed = await self._bodies.parse(http_request, self._parse, deadline)
            request_id = given or given_request_id(parsed.request_id) or request_id
            structlog.contextvars.bind_contextvars(request_id=request_id)
            deadline.check()
            stream = await self._open(parsed, request_id)
            headers = {REQUEST_ID_HEADER: request_id}
            if parsed.request.stream:
                return EventStream(stream.events(), stream, headers, deadline)
            completion = await self._whole(stream, http_request.receive, deadline)
        except ClientDisconnectedError:
            return Response(status_code=CLIENT_LEFT)
        except GalaxylineError as error:
            return refusal(error, {REQUEST_ID_HEADER: request_id})
        return Response(encode(completion), 200, headers, media_type="application/json")

    def _refuse_unless_ready(self) -> None:
        state = self._engine.state
        # While a stage is replaced requests wait, so that clients see no more of it than a pause.
        if not takes_requests(state):
            raise not_ready(state)

    async def _whole(self, stream: CompletionStream, receive: Receive, deadline: RequestDeadline) -> Completion:
        async with aclosing(stream):
            try:
                return await run_while_connected(receive, stream.whole(), deadline)
            except DeadlineError as error:
                stream.last_words(error)
                raise

    def _parse(self, body: bytes, check: Check) -> ParsedRequest:
        request = parse_completion_request(body)
        refuse_other_model(request.model, self._model)
        parsed = ParsedRequest(
            request=request,
            request_id=request.request_id,
            prompts=read_prompts(request, self._model, check, self._admission.check_size),
            sampling=sampling_params(request, self._model, check),
        )
        request.forget_input()
        return parsed

    async def _open(self, parsed: ParsedRequest, request_id: str) -> CompletionStream:
        """Sends all choices to the engine, or none: a request that cannot be served fails before its answer begins."""
        choices = build_choices(
            parsed.request,
            parsed.prompts,
            parsed.sampling,
            self._model,
            self._engine.next_request_id,
            self._draw_seed,
        )
        prompt_tokens = {choice.index: len(choice.prompt.tokens) for choice in choices if choice.request is not None}
        ticket = self._admission.admit(prompt_tokens)
        chunks = ChunkStream()
        try:
            for choice in choices:
                text = CompletionText(choice, parsed.request, self._model)
                if choice.request is None:
                    chunks.add_empty_choice(text)
                else:
                    chunks.add_choice(text, self._engine.generate(choice.request))
        except GalaxylineError:
            await chunks.aclose()
            ticket.release()
            raise
        name = f"cmpl-{request_id}"
        return CompletionStream(name, self._model.name, parsed.request, choices, chunks, ticket, self._metrics)
