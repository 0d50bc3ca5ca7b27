"""The way of an answer from the engine's outputs to the client: chunks of text, a route's format, and a log line."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Literal, Protocol

import msgspec
import structlog

from api.client.open_requests import OUTPUTS_WAITING_MAX, TOO_SLOW, TokenStream
from api.client.request_metrics import CompletionMetrics
from api.errors import EngineError
from api.messages.engine import FinishReason, RequestOutput
from api.openai.bodies import INTERNAL_ERROR, ErrorBody, Usage, error_body, status_body
from api.openai.generation import Choice, GenerationRequest
from api.openai.logprobs import Details, TokenDetails
from api.openai.stop_strings import StopStrings
from api.text.served_model import ServedModel
from weights.errors import GalaxylineError

ChunkFinish = Literal["stop", "length"]

FINISHES: dict[FinishReason, ChunkFinish] = {"stop": "stop", "length": "length"}
"""The reasons that clients get; with any other, the engine ended a request that was not complete."""

DROPPED = "The engine dropped this request before it was complete."

log = structlog.get_logger()


class Chunk(msgspec.Struct, frozen=True):
    """The next text of choice `index`, which has `completion_tokens` so far; its last chunk has a `finish_reason`.

    `stop_reason` is the stop string or stop token that ended the choice, None where EOS or the length did. Of the
    choice's prompt `cached_tokens` were not computed.
    """

    index: int
    text: str
    completion_tokens: int
    finish_reason: ChunkFinish | None
    stop_reason: int | str | None
    details: Details | None
    cached_tokens: int = 0


class ChoiceText:
    """Turns the tokens of one choice into chunks of text, each with the details of all tokens since the one before."""

    def __init__(self, choice: Choice, request: GenerationRequest, model: ServedModel) -> None:
        """An echo goes before the first chunk's text; stop strings are not looked for in it."""
        self._index = choice.index
        self._is_echo = choice.is_echo
        self._unsent = choice.prompt.echo
        self._decoder = model.tokenizer.decoder(request.skips_special_tokens)
        self._shows_stop = request.includes_stop
        self._stops = StopStrings(request.stops, self._shows_stop)
        self._min_tokens = request.min_tokens
        self._eos_token_ids = frozenset(() if request.ignores_eos else model.eos_token_ids)
        details = request.details
        self._details = None if details.is_empty else TokenDetails(details, choice.prompt, model.tokenizer)
        self._has_logprobs = details.logprobs is not None
        self._tokens = 0
        self._cached_tokens = 0

    def add_output(self, output: RequestOutput) -> Iterator[Chunk]:
        """Gives at most one chunk for each token, fewer while text is held back; the last has the finish reason.

        Raises EngineError where the engine ended the request before it was complete.
        """
        finish = None if output.finish_reason is None else FINISHES.get(output.finish_reason)
        if output.finish_reason is not None and finish is None:
            raise EngineError(output.error or DROPPED, public=output.public or DROPPED)
        self._cached_tokens = output.cached_tokens
        if self._details is not None:
            self._details.add_prompt_entries(output.prompt_logprobs)
        if self._is_echo:
            if finish is not None:
                yield self.empty()
            return
        last = len(output.tokens) - 1
        for index, token in enumerate(output.tokens):
            if finish is not None and index == last:
                yield self._last_chunk(output, finish)
                return
            text = self._decoder.add(token)
            released = self._add_token(output, index, text)
            if self._stops.matched is not None:
                yield self._chunk(released or "", "stop", self._stops.matched)
                return
            if released or text == "":
                yield self._chunk(released or "", None)

    def empty(self) -> Chunk:
        """The only chunk of a choice that has no tokens."""
        return self._chunk("", "length")

    def _add_token(self, output: RequestOutput, index: int, text: str | None) -> str | None:
        """Counts a token that gave this text, and returns the text that can go to the client now."""
        self._tokens += 1
        if self._details is not None:
            entry = output.logprobs[index] if self._has_logprobs else None
            self._details.add_token(output.tokens[index], entry, len(text or ""))
        return self._stops.add_text(text, self._tokens > self._min_tokens) if text else text

    def _last_chunk(self, output: RequestOutput, finish: ChunkFinish) -> Chunk:
        token = output.tokens[-1]
        is_shown = finish == "length" or self._shows_stop
        text = ((self._decoder.add(token) or "") if is_shown else "") + self._decoder.flush()
        released = self._add_token(output, len(output.tokens) - 1, text) or ""
        if self._stops.matched is not None:
            return self._chunk(released, "stop", self._stops.matched)
        stop = token if finish == "stop" and token not in self._eos_token_ids else None
        return self._chunk(released + self._stops.flush(), finish, stop)

    def _chunk(self, text: str, finish: ChunkFinish | None, stop: int | str | None = None) -> Chunk:
        text, self._unsent = self._unsent + text, ""
        details = None if self._details is None else self._details.take_details()
        return Chunk(self._index, text, self._tokens, finish, stop, details, self._cached_tokens)


class ChunkStream:
    """The chunks of all choices of one request, as they come: those of one output of the engine together.

    Close it in any case: `contextlib.aclosing`. A choice whose text ends with a stop string is aborted in the engine at
    once; `aclose` aborts the others.
    """

    def __init__(self) -> None:
        self._choices: list[tuple[ChoiceText, TokenStream]] = []
        self._empty: list[Chunk] = []

    def add_choice(self, text: ChoiceText, stream: TokenStream) -> None:
        """Adds a choice whose tokens come from `stream`."""
        self._choices.append((text, stream))

    def add_empty_choice(self, text: ChoiceText) -> None:
        """Adds a choice for which nothing is generated."""
        self._empty.append(text.empty())

    async def aclose(self) -> None:
        """Aborts the choices that have not ended. May be repeated, but not during an iteration."""
        for _, stream in self._choices:
            await stream.aclose()

    async def __aiter__(self) -> AsyncGenerator[list[Chunk], None]:
        """Raises what the engine's streams raise; the other choices then give no more chunks."""
        for chunk in self._empty:
            yield [chunk]
        source = _chunks_of(*self._choices[0]) if len(self._choices) == 1 else _merged(self._choices)
        async with aclosing(source):
            async for chunks in source:
                yield chunks


async def _chunks_of(text: ChoiceText, stream: TokenStream) -> AsyncGenerator[list[Chunk], None]:
    async for output in stream:
        chunks = list(text.add_output(output))
        if not chunks:
            continue
        is_last = chunks[-1].finish_reason is not None
        if is_last:
            await stream.aclose("stop")
        yield chunks
        if is_last:
            return
    raise EngineError.for_clients("The engine's answer ended before this request was complete.")


async def _merged(choices: list[tuple[ChoiceText, TokenStream]]) -> AsyncGenerator[list[Chunk], None]:
    # A client that does not read holds up all its choices, but not for ever: `_forward` ends them.
    queue: asyncio.Queue[list[Chunk] | None] = asyncio.Queue()
    most = OUTPUTS_WAITING_MAX * len(choices)
    tasks = [asyncio.create_task(_forward(text, stream, queue, most)) for text, stream in choices]
    try:
        running = len(tasks)
        while running:
            chunks = await queue.get()
            if chunks is not None:
                yield chunks
                continue
            running -= 1
            for task in tasks:
                if task.done():
                    task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _forward(text: ChoiceText, stream: TokenStream, queue: asyncio.Queue[list[Chunk] | None], most: int) -> None:
    try:
        async for chunks in _chunks_of(text, stream):
            if queue.qsize() >= most:
                await stream.aclose()
                raise EngineError.for_clients(TOO_SLOW)
            queue.put_nowait(chunks)
    finally:
        queue.put_nowait(None)


class Ticket(Protocol):
    """The place that a request takes up in the queue until its choices end."""

    def began(self, index: int) -> None:
        """Notes that the first chunk of a choice has come."""

    def ended(self, index: int) -> None:
        """Notes that the last chunk of a choice has come."""

    def release(self) -> None:
        """Gives back what is left of the place. May be repeated."""


class AnswerWriter(Protocol):
    """What a route makes of chunks. `usage` counts the tokens so far."""

    id: str

    def whole(self, choices: list[list[Chunk]], usage: Usage) -> msgspec.Struct:
        """The answer that consists of these chunks of each choice."""

    def first_events(self, usage: Usage) -> Iterator[bytes]:
        """The events before the first chunk, when nothing is generated yet: none, unless a route has some."""
        yield from ()

    def events(self, chunks: list[Chunk], usage: Usage) -> Iterator[bytes]:
        """The server-sent events of chunks of one choice that came together; `usage` is that of the choice alone.

        What could be one event is one, as in vLLM.
        """

    def last_events(self, usage: Usage) -> Iterator[bytes]:
        """The events after the last chunk."""

    def failure(self, body: ErrorBody) -> bytes:
        """The last events of a stream that ends early."""


class AnswerStream:
    """One answer on its way to the client: iterate over `events`, or await `whole`.

    Close it in any case: `contextlib.aclosing`.
    """

    def __init__(
        self,
        request: GenerationRequest,
        choices: list[Choice],
        source: ChunkStream,
        answer: AnswerWriter,
        ticket: Ticket,
        metrics: CompletionMetrics,
    ) -> None:
        self._request = request
        self._choices = choices
        self._source = source
        self._answer = answer
        self._ticket = ticket
        self._metrics = metrics
        self._began = time.monotonic()
        self._last: dict[int, Chunk] = {}
        self._failure: str | None = None

    async def whole(self) -> msgspec.Struct:
        """Waits for the whole answer. Raises what the engine's streams raise."""
        chunks: list[list[Chunk]] = [[] for _ in self._choices]
        try:
            async for together in self._source:
                self._record(together[-1])
                chunks[together[-1].index] += together
        except Exception as error:
            self._failure = str(error)
            raise
        return self._answer.whole(chunks, self._usage())

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Gives the chunks as server-sent events. A failure is an event too."""
        try:
            for event in self._answer.first_events(self._usage()):
                yield event
            async for chunks in self._source:
                last = chunks[-1]
                self._record(last)
                prompt_tokens = len(self._choices[last.index].prompt.tokens)
                usage = Usage.of(prompt_tokens, last.completion_tokens, last.cached_tokens)
                for event in self._answer.events(chunks, usage):
                    yield event
            for event in self._answer.last_events(self._usage()):
                yield event
        except GalaxylineError as error:
            self._failure = str(error)
            yield self._answer.failure(error_body(error))
        except Exception as error:
            self._failure = repr(error)
            yield self._answer.failure(status_body(500, INTERNAL_ERROR))
            raise

    def last_words(self, error: GalaxylineError) -> bytes:
        """The last events of a stream that ends early because of `error`."""
        self._failure = str(error)
        return self._answer.failure(error_body(error))

    async def aclose(self) -> None:
        """Aborts what has not ended, and logs how the request went. Call it once, and not during an iteration."""
        await self._source.aclose()
        self._ticket.release()
        self._measure()
        self._log()

    def _record(self, chunk: Chunk) -> None:
        """Notes the last chunk of a choice so far."""
        if chunk.index not in self._last:
            self._ticket.began(chunk.index)
        self._last[chunk.index] = chunk
        if chunk.finish_reason is not None:
            self._ticket.ended(chunk.index)

    def _usage(self) -> Usage:
        """The counts so far: each prompt counts once, as its first choice found it, however many choices it has."""
        prompt_tokens = sum(len(prompt.tokens) for prompt in self._request.prompts)
        count = self._request.choice_count
        return Usage.of(
            prompt_tokens,
            sum(chunk.completion_tokens for chunk in self._last.values()),
            sum(chunk.cached_tokens for index, chunk in self._last.items() if index % count == 0),
        )

    def _measure(self) -> None:
        count = self._request.choice_count
        for first in range(0, len(self._choices), count):
            last = [self._last.get(index) for index in range(first, first + count)]
            ended = [chunk.completion_tokens for chunk in last if chunk is not None and chunk.finish_reason is not None]
            if len(ended) == count:
                self._metrics.ended(ended)

    def _log(self) -> None:
        usage = self._usage()
        ids = [choice.request.request_id for choice in self._choices if choice.request is not None]
        reasons = Counter(chunk.finish_reason or "abort" for chunk in self._last.values())
        reasons["abort"] += len(self._choices) - len(self._last)
        fields = {
            "id": self._answer.id,
            "engine_requests": f"{ids[0]}-{ids[-1]}" if len(ids) > 1 else "".join(map(str, ids)),
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
            "finish_reasons": dict(+reasons),
            "seconds": round(time.monotonic() - self._began, 4),
        }
        if self._failure is None:
            log.info("completion ended", **fields)
        else:
            log.warning("completion failed", **fields, error=self._failure)
