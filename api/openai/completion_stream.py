"""The answer to one completion request: whole or in chunks, its usage, and its line in the log."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Protocol

import msgspec
import structlog

from api.client.open_requests import OUTPUTS_WAITING_MAX, TOO_SLOW
from api.client.token_source import TokenStream
from api.errors import EngineError
from api.messages.engine import FinishReason, RequestOutput
from api.openai.choices import Choice
from api.openai.logprobs import Details, TokenDetails, joined_logprobs
from api.openai.prompts import Prompt
from api.openai.protocol import CompletionRequest, StreamOptions
from api.openai.responses import (
    DONE_EVENT,
    INTERNAL_ERROR,
    Completion,
    CompletionChoice,
    CompletionFinish,
    Usage,
    error_body,
    event,
    status_body,
)
from api.openai.stop_strings import StopStrings
from api.text.served_model import ServedModel
from weights.errors import GalaxylineError

FINISHES: dict[FinishReason, CompletionFinish] = {"stop": "stop", "length": "length"}

"""The reasons that clients are told; with any other the engine gave the request up."""


DROPPED = "The engine dropped this request before it was complete."


class Piece(msgspec.Struct, frozen=True):
    """The next text of choice `index`, which has `completion_tokens` so far; its last piece has a `finish_reason`.

    `stop_reason` is the stop string or stop token that ended it, None where EOS or the length did.
    """

    index: int
    text: str
    completion_tokens: int
    finish_reason: CompletionFinish | None
    stop_reason: int | str | None
    details: Details | None


class CompletionText:
    """One choice: its tokens in, pieces of its text out, each with the details of all tokens since the last one."""

    def __init__(self, choice: Choice, request: CompletionRequest, model: ServedModel) -> None:
        """An echo goes before the first piece; no stop string is looked for in it."""
        self._index = choice.index
        self._is_echo = choice.is_echo
        self._unsent = choice.prompt.echo
        self._decoder = model.tokenizer.decoder(request.skip_special_tokens is not False)
        self._shows_stop = request.include_stop_str_in_output or False
        self._stops = StopStrings(request.stop, self._shows_stop)
        self._min_tokens = request.min_tokens or 0
        self._eos_token_ids = frozenset(() if request.ignore_eos else model.eos_token_ids)
        self._details = TokenDetails.asked(request, choice.prompt, model.tokenizer)
        self._has_logprobs = request.logprobs is not None
        self._tokens = 0

    def add(self, output: RequestOutput) -> Iterator[Piece]:
        """At most one piece for each token, fewer while text is held back; the last has the finish reason.

        Raises EngineError where the engine gave the request up.
        """
        finish = None if output.finish_reason is None else FINISHES.get(output.finish_reason)
        if output.finish_reason is not None and finish is None:
            raise EngineError(output.error or DROPPED, public=output.public or DROPPED)
        if self._details is not None:
            self._details.add_prompt(output.prompt_logprobs)
        if self._is_echo:
            if finish is not None:
                yield self.whole()
            return
        last = len(output.tokens) - 1
        for place, token in enumerate(output.tokens):
            if finish is not None and place == last:
                yield self._last(output, finish)
                return
            text = self._decoder.add(token)
            released = self._add(output, place, text)
            if self._stops.matched is not None:
                yield self._piece(released or "", "stop", self._stops.matched)
                return
            if released or text == "":
                yield self._piece(released or "", None)

    def whole(self) -> Piece:
        """The only piece of a completion that has no tokens."""
        return self._piece("", "length")

    def _add(self, output: RequestOutput, place: int, text: str | None) -> str | None:
        """Counts a token that gave this text; the text that can go to the client now."""
        self._tokens += 1
        if self._details is not None:
            entry = output.logprobs[place] if self._has_logprobs else None
            self._details.add(output.tokens[place], entry, len(text or ""))
        return self._stops.add(text, self._tokens > self._min_tokens) if text else text

    def _last(self, output: RequestOutput, finish: CompletionFinish) -> Piece:
        token = output.tokens[-1]
        is_shown = finish == "length" or self._shows_stop
        text = ((self._decoder.add(token) or "") if is_shown else "") + self._decoder.flush()
        released = self._add(output, len(output.tokens) - 1, text) or ""
        if self._stops.matched is not None:
            return self._piece(released, "stop", self._stops.matched)
        stop = token if finish == "stop" and token not in self._eos_token_ids else None
        return self._piece(released + self._stops.flush(), finish, stop)

    def _piece(self, text: str, finish: CompletionFinish | None, stop: int | str | None = None) -> Piece:
        text, self._unsent = self._unsent + text, ""
        details = None if self._details is None else self._details.take()
        return Piece(self._index, text, self._tokens, finish, stop, details)


class Pieces:
    """The pieces of all choices of one answer, as they come. Close it however the answer ends: `contextlib.aclosing`.

    A choice whose text a stop string ended is aborted in the engine at once; `aclose` aborts the rest.
    """

    def __init__(self) -> None:
        self._choices: list[tuple[CompletionText, TokenStream]] = []
        self._whole: list[Piece] = []

    def add(self, text: CompletionText, stream: TokenStream) -> None:
        """One more choice, with its tokens to come from `stream`."""
        self._choices.append((text, stream))

    def add_whole(self, text: CompletionText) -> None:
        """One more choice, which generates nothing."""
        self._whole.append(text.whole())

    async def aclose(self) -> None:
        """Aborts what has not ended. May be repeated; nobody may be iterating."""
        for _, stream in self._choices:
            await stream.aclose()

    async def __aiter__(self) -> AsyncGenerator[Piece, None]:
        """Raises what the engine's streams raise, after which the other choices are of no use."""
        for piece in self._whole:
            yield piece
        source = _pieces(*self._choices[0]) if len(self._choices) == 1 else _merged(self._choices)
        async with aclosing(source):
            async for piece in source:
                yield piece


async def _pieces(text: CompletionText, stream: TokenStream) -> AsyncGenerator[Piece, None]:
    async for output in stream:
        for piece in text.add(output):
            if piece.finish_reason is not None:
                await stream.aclose("stop")
            yield piece
            if piece.finish_reason is not None:
                return
    raise EngineError.for_clients("The engine's answer ended before this request was complete.")


async def _merged(choices: list[tuple[CompletionText, TokenStream]]) -> AsyncGenerator[Piece, None]:
    # A client that does not read holds up all its choices, but none of them for ever: see `RequestStream`.
    queue: asyncio.Queue[Piece | None] = asyncio.Queue()
    most = OUTPUTS_WAITING_MAX * len(choices)
    tasks = [asyncio.create_task(_forward(text, stream, queue, most)) for text, stream in choices]
    try:
        running = len(tasks)
        while running:
            piece = await queue.get()
            if piece is not None:
                yield piece
                continue
            running -= 1
            for task in tasks:
                if task.done():
                    task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _forward(text: CompletionText, stream: TokenStream, queue: asyncio.Queue[Piece | None], most: int) -> None:
    try:
        async for piece in _pieces(text, stream):
            if queue.qsize() >= most:
                await stream.aclose()
                raise EngineError.for_clients(TOO_SLOW)
            queue.put_nowait(piece)
    finally:
        queue.put_nowait(None)


log = structlog.get_logger()


class Ticket(Protocol):
    """What admission keeps of a request until its choices end."""

    def began(self, index: int) -> None:
        """Notes that the first chunk of a choice has come."""

    def ended(self, index: int) -> None:
        """Notes that the last chunk of a choice has come."""

    def release(self) -> None:
        """Gives up what is left of the request. May be repeated."""


class Answer:
    """Iterate over `events`, or await `whole`. Close it however it ends: `contextlib.aclosing`."""

    def __init__(
        self,
        answer_id: str,
        model: str,
        request: CompletionRequest,
        prompts: list[Prompt],
        choices: list[Choice],
        pieces: Pieces,
        ticket: Ticket,
    ) -> None:
        self._id = answer_id
        self._model = model
        self._request = request
        self._prompts = prompts
        self._choices = choices
        self._pieces = pieces
        self._ticket = ticket
        self._created = int(time.time())
        self._began = time.monotonic()
        self._last: dict[int, Piece] = {}
        self._failure: str | None = None

    async def whole(self) -> Completion:
        """All of it at once. Raises what the engine's streams raise."""
        pieces: dict[int, list[Piece]] = {choice.index: [] for choice in self._choices}
        try:
            async for piece in self._pieces:
                self._note(piece)
                pieces[piece.index].append(piece)
        except Exception as error:
            self._failure = str(error)
            raise
        return self._completion([_joined(parts) for parts in pieces.values()], self._usage())

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Its chunks as server-sent events. A failure is an event too, and the last one before [DONE]."""
        try:
            async for chunk in self._chunks():
                yield event(chunk)
        except GalaxylineError as error:
            self._failure = str(error)
            yield event(error_body(error))
        except Exception as error:
            self._failure = repr(error)
            yield event(status_body(500, INTERNAL_ERROR))
            yield DONE_EVENT
            raise
        yield DONE_EVENT

    def last_words(self, error: GalaxylineError) -> bytes:
        """The last events of a stream that has to end early, because of `error`."""
        self._failure = str(error)
        return event(error_body(error)) + DONE_EVENT

    async def aclose(self) -> None:
        """Aborts what has not ended, and logs how the request went. Nobody may be iterating; once is enough."""
        await self._pieces.aclose()
        self._ticket.release()
        self._log()

    def _note(self, piece: Piece) -> None:
        if piece.index not in self._last:
            self._ticket.began(piece.index)
        self._last[piece.index] = piece
        if piece.finish_reason is not None:
            self._ticket.ended(piece.index)

    async def _chunks(self) -> AsyncGenerator[Completion, None]:
        options = self._request.stream_options or StreamOptions()
        usage: Usage | msgspec.UnsetType | None = None if options.include_usage else msgspec.UNSET
        async for piece in self._pieces:
            self._note(piece)
            if options.continuous_usage_stats:
                usage = Usage.of(len(self._choices[piece.index].prompt.tokens), piece.completion_tokens)
            yield self._completion([_choice(piece)], usage)
        if options.include_usage:
            yield self._completion([], self._usage())

    def _completion(self, choices: list[CompletionChoice], usage: Usage | msgspec.UnsetType | None) -> Completion:
        return Completion(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)

    def _usage(self) -> Usage:
        """The counts of the whole answer so far: each prompt once, however many choices it has."""
        prompt_tokens = sum(len(prompt.tokens) for prompt in self._prompts)
        return Usage.of(prompt_tokens, sum(piece.completion_tokens for piece in self._last.values()))

    def _log(self) -> None:
        usage = self._usage()
        ids = [choice.request.request_id for choice in self._choices if choice.request is not None]
        reasons = Counter(piece.finish_reason or "abort" for piece in self._last.values())
        reasons["abort"] += len(self._choices) - len(self._last)
        fields = {
            "id": self._id,
            "engine_requests": f"{ids[0]}-{ids[-1]}" if len(ids) > 1 else "".join(map(str, ids)),
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "finish_reasons": dict(+reasons),
            "seconds": round(time.monotonic() - self._began, 4),
        }
        if self._failure is None:
            log.info("completion ended", **fields)
        else:
            log.warning("completion failed", **fields, error=self._failure)


def _choice(piece: Piece) -> CompletionChoice:
    details = piece.details
    if details is None:
        return CompletionChoice(
            index=piece.index, text=piece.text, finish_reason=piece.finish_reason, stop_reason=piece.stop_reason
        )
    return CompletionChoice(
        index=piece.index,
        text=piece.text,
        logprobs=details.logprobs,
        finish_reason=piece.finish_reason,
        stop_reason=piece.stop_reason,
        token_ids=details.token_ids,
        prompt_token_ids=details.prompt_token_ids,
        prompt_logprobs=details.prompt_logprobs,
    )


def _joined(pieces: list[Piece]) -> CompletionChoice:
    """The whole of a choice."""
    last = pieces[-1]
    text = "".join(piece.text for piece in pieces)
    details = [piece.details for piece in pieces if piece.details is not None]
    if not details:
        return _choice(msgspec.structs.replace(last, text=text))
    first = details[0]
    whole = msgspec.structs.replace(
        first,
        logprobs=joined_logprobs([part.logprobs for part in details if part.logprobs is not None]),
        token_ids=msgspec.UNSET
        if first.token_ids is msgspec.UNSET
        else [token for part in details for token in part.token_ids or []],
    )
    return _choice(msgspec.structs.replace(last, text=text, details=whole))
