"""POST /v1/completions."""

import asyncio
import re
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import Executor
from contextlib import aclosing

import msgspec
import structlog
from starlette.requests import Request
from starlette.responses import Response

from api.choices import Choice, Prompt, build_choices, read_prompts
from api.disconnect import ClientDisconnectedError, run_while_connected
from api.error_responses import INTERNAL_ERROR, error_body, not_ready, status_body
from api.event_stream import EventStream
from api.pieces import CompletionText, Piece, Pieces
from api.protocol import CompletionRequest, StreamOptions, parse_completion_request
from api.request_body import read_body
from api.responses import DONE_EVENT, Completion, CompletionChoice, Usage, encode, event
from api.served_model import ServedModel
from api.stop_strings import StopStrings
from api.token_source import TokenSource
from weights.errors import GalaxylineError

INLINE_BODY_BYTES_MAX = 4096
"""Larger bodies are read and tokenised on a thread, so as not to delay streams: this many take about a millisecond."""

REQUEST_ID_HEADER = "x-request-id"

_REQUEST_ID = re.compile(r"[!-~]{1,128}")

log = structlog.get_logger()


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What all parts of one answer have in common, and its choices."""

    id: str
    created: int
    model: str
    request: CompletionRequest
    prompts: list[Prompt]
    choices: list[Choice]

    def completion(self, choices: list[CompletionChoice], usage: Usage | msgspec.UnsetType | None) -> Completion:
        """A part of this answer, or all of it."""
        return Completion(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)

    def usage(self, last_pieces: Iterable[Piece]) -> Usage:
        """The counts of the whole answer: each prompt once, however many choices it has."""
        prompt_tokens = sum(len(prompt.tokens) for prompt in self.prompts)
        return Usage.of(prompt_tokens, sum(piece.completion_tokens for piece in last_pieces))


class Completions:
    """Answers completion requests for one model with one engine."""

    def __init__(
        self, model: ServedModel, engine: TokenSource, tokenizer_threads: Executor, draw_seed: Callable[[], int]
    ) -> None:
        """`draw_seed` gives the seed of a prompt whose request has none."""
        self._model = model
        self._engine = engine
        self._tokenizer_threads = tokenizer_threads
        self._draw_seed = draw_seed

    async def create(self, http_request: Request) -> Response:
        """The route's handler. Raises GalaxylineError for what the client shall be told instead of an answer."""
        state = self._engine.state
        if state.phase != "ready":
            raise not_ready(state.phase, state.detail)
        request_id = http_request.headers.get(REQUEST_ID_HEADER, "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex
        headers = {REQUEST_ID_HEADER: request_id}
        try:
            answer = await self._read(await read_body(http_request), request_id)
            pieces = await self._open(answer)
            if answer.request.stream:
                return EventStream(_events(answer, pieces), pieces, headers)
            async with aclosing(pieces):
                completion = await run_while_connected(http_request.receive, _completion(answer, pieces))
        except ClientDisconnectedError:
            return Response(status_code=499)  # nginx's number for it; nobody is there to see it
        return Response(encode(completion), 200, headers, media_type="application/json")

    async def _read(self, body: bytes, request_id: str) -> Answer:
        if len(body) <= INLINE_BODY_BYTES_MAX:
            request, prompts = self._parse(body)
        else:
            loop = asyncio.get_running_loop()
            request, prompts = await loop.run_in_executor(self._tokenizer_threads, self._parse, body)
        choices = build_choices(request, prompts, self._model, self._engine.next_request_id, self._draw_seed)
        return Answer(
            id=f"cmpl-{request_id}",
            created=int(time.time()),
            model=self._model.name,
            request=request,
            prompts=prompts,
            choices=choices,
        )

    def _parse(self, body: bytes) -> tuple[CompletionRequest, list[Prompt]]:
        request = parse_completion_request(body)
        return request, read_prompts(request, self._model)

    async def _open(self, answer: Answer) -> Pieces:
        """Hands all choices to the engine, or none: a request that cannot be served fails before its answer begins."""
        pieces = Pieces()
        try:
            for choice in answer.choices:
                text = self._text(choice, answer.request)
                if choice.request is None:
                    pieces.add_whole(text)
                else:
                    pieces.add(text, self._engine.generate(choice.request))
        except GalaxylineError:
            await pieces.aclose()
            raise
        return pieces

    def _text(self, choice: Choice, request: CompletionRequest) -> CompletionText:
        decoder = self._model.tokenizer.decoder(request.skip_special_tokens is not False)
        stops = StopStrings(request.stop, request.include_stop_str_in_output or False)
        return CompletionText(choice.index, decoder, stops, choice.prompt.echo)


async def _completion(answer: Answer, pieces: Pieces) -> Completion:
    texts: dict[int, list[str]] = {choice.index: [] for choice in answer.choices}
    last: dict[int, Piece] = {}
    async for piece in pieces:
        texts[piece.index].append(piece.text)
        last[piece.index] = piece
    choices = [
        CompletionChoice(index=index, text="".join(text), finish_reason=last[index].finish_reason)
        for index, text in texts.items()
    ]
    return answer.completion(choices, answer.usage(last.values()))


async def _events(answer: Answer, pieces: Pieces) -> AsyncGenerator[bytes, None]:
    try:
        async for chunk in _chunks(answer, pieces):
            yield event(chunk)
    except GalaxylineError as error:
        log.warning("completion failed in mid-stream", id=answer.id, error=str(error))
        yield event(error_body(error))
    except Exception:
        yield event(status_body(500, INTERNAL_ERROR))
        yield DONE_EVENT
        raise
    yield DONE_EVENT


async def _chunks(answer: Answer, pieces: Pieces) -> AsyncGenerator[Completion, None]:
    options = answer.request.stream_options or StreamOptions()
    usage: Usage | msgspec.UnsetType | None = None if options.include_usage else msgspec.UNSET
    last: dict[int, Piece] = {}
    async for piece in pieces:
        last[piece.index] = piece
        if options.continuous_usage_stats:
            usage = Usage.of(len(answer.choices[piece.index].prompt.tokens), piece.completion_tokens)
        choice = CompletionChoice(index=piece.index, text=piece.text, finish_reason=piece.finish_reason)
        yield answer.completion([choice], usage)
    if options.include_usage:
        yield answer.completion([], answer.usage(last.values()))
