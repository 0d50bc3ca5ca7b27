"""Completing many prompts through an engine, with the time of every token."""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Protocol

import msgspec

from api.client.token_source import TokenSource
from api.messages.engine import AddRequest


class TextDecoder(Protocol):
    """Turns tokens into text as they come; api.text.incremental_decoder.IncrementalDecoder is one."""

    def add(self, token: int) -> str | None:
        """The text that a token completes, None while a character is short of bytes."""

    def flush(self) -> str:
        """What can be read of the tokens held back."""


class TokenIds:
    """The text of tokens where there is no tokenizer: their ids, with spaces between."""

    def add(self, token: int) -> str:
        """The id."""
        return f"{token} "

    def flush(self) -> str:
        """Nothing."""
        return ""


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """The completion of one prompt.

    `tokens` are those sampled, without the one it stopped at; `times` are those of all that were sampled, in seconds
    of one clock, as `submitted` is.
    """

    prompt_tokens: int
    tokens: list[int]
    text: str
    submitted: float
    times: list[float]


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """One request and how its tokens are read; `on_text` gets its text as it comes, and all of it in the end."""

    request: AddRequest
    decoder: TextDecoder
    on_text: Callable[[str], None] | None = None
    on_done: Callable[[Generation], None] | None = None


async def generate(engine: TokenSource, demands: Sequence[Demand]) -> list[Generation]:
    """Completes all at once; the completions come in the order of `demands`.

    Raises EngineError if the engine fails, and what `on_done` raises; the others are aborted then.
    """
    tasks = [asyncio.create_task(_complete(engine, demand)) for demand in demands]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _complete(engine: TokenSource, demand: Demand) -> Generation:
    tokens: list[int] = []
    times: list[float] = []
    text: list[str] = []

    def add_text(piece: str) -> None:
        text.append(piece)
        if demand.on_text is not None and piece:
            demand.on_text(piece)

    submitted = time.monotonic()
    async with aclosing(engine.generate(demand.request)) as outputs:
        async for output in outputs:
            now = time.monotonic()
            times += [now] * len(output.tokens)
            for token in output.tokens if output.finish_reason != "stop" else output.tokens[:-1]:
                tokens.append(token)
                add_text(demand.decoder.add(token) or "")
    add_text(demand.decoder.flush())
    generation = Generation(
        prompt_tokens=len(demand.request.tokens), tokens=tokens, text="".join(text), submitted=submitted, times=times
    )
    if demand.on_done is not None:
        demand.on_done(generation)
    return generation
