"""The pieces of all choices of one answer, in the order in which they come."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from api.client.request_stream import OUTPUTS_WAITING_MAX, TOO_SLOW
from api.client.token_source import TokenStream
from api.errors import EngineError
from api.openai.completion_text import CompletionText, Piece


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
                raise EngineError(TOO_SLOW)
            queue.put_nowait(piece)
    finally:
        queue.put_nowait(None)
