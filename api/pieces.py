"""From the engine's tokens to the pieces of text that go to the client."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing

import msgspec

from api.errors import EngineError
from api.incremental_decoder import IncrementalDecoder
from api.messages import FinishReason, RequestOutput
from api.responses import CompletionFinish
from api.stop_strings import StopStrings
from api.token_source import TokenStream

FINISHES: dict[FinishReason, CompletionFinish] = {"stop": "stop", "length": "length"}
"""The reasons that clients are told; with any other the engine gave the request up."""


class Piece(msgspec.Struct, frozen=True):
    """The next text of choice `index`, which has `completion_tokens` so far; its last piece has a `finish_reason`."""

    index: int
    text: str
    completion_tokens: int
    finish_reason: CompletionFinish | None


class CompletionText:
    """One completion as it grows: its tokens in, pieces of its text out."""

    def __init__(self, index: int, decoder: IncrementalDecoder, stops: StopStrings, echo: str) -> None:
        """`echo` goes before the first piece; no stop string is looked for in it."""
        self._index = index
        self._decoder = decoder
        self._stops = stops
        self._unsent = echo
        self._tokens = 0

    def add(self, output: RequestOutput) -> Iterator[Piece]:
        """At most one piece for each token, fewer while text is held back; the last has the finish reason.

        Raises EngineError where the engine gave the request up.
        """
        finish = None if output.finish_reason is None else FINISHES.get(output.finish_reason)
        if output.finish_reason is not None and finish is None:
            raise EngineError(output.error or "The engine dropped this request before it was complete.")
        for token in output.tokens if finish is None else output.tokens[:-1]:
            text = self._decoder.add(token)
            self._tokens += 1
            released = self._stops.add(text) if text else text
            if self._stops.matched:
                yield self._piece(released or "", "stop")
                return
            if released or text == "":
                yield self._piece(released or "", None)
        if finish is not None:
            yield self._last(output.tokens[-1:], finish)

    def _last(self, tokens: list[int], finish: CompletionFinish) -> Piece:
        # The token that a completion stops at has no text of its own.
        shown = tokens if finish == "length" else []
        text = "".join(self._decoder.add(token) or "" for token in shown) + self._decoder.flush()
        self._tokens += len(tokens)
        released = self._stops.add(text)
        if self._stops.matched:
            return self._piece(released, "stop")
        return self._piece(released + self._stops.flush(), finish)

    def whole(self) -> Piece:
        """The only piece of a completion that has no tokens."""
        return self._piece("", "length")

    def _piece(self, text: str, finish: CompletionFinish | None) -> Piece:
        text, self._unsent = self._unsent + text, ""
        return Piece(self._index, text, self._tokens, finish)


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
    raise EngineError("The engine's answer ended before this request was complete.")


async def _merged(choices: list[tuple[CompletionText, TokenStream]]) -> AsyncGenerator[Piece, None]:
    queue: asyncio.Queue[Piece | None] = asyncio.Queue()
    tasks = [asyncio.create_task(_forward(text, stream, queue)) for text, stream in choices]
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


async def _forward(text: CompletionText, stream: TokenStream, queue: asyncio.Queue[Piece | None]) -> None:
    try:
        async for piece in _pieces(text, stream):
            queue.put_nowait(piece)
    finally:
        queue.put_nowait(None)
