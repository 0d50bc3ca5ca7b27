"""Answers of two servers that run at once, one with drafts and one without, and are asked in turn."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import msgspec

from api.messages.engine import DraftCounts
from api.messages.pipeline_view import PipelineView
from benchmarks.drafts.case import DRAFTS, DraftsRow, DraftTally, Load, Turn, prompts, row_of
from benchmarks.support.ports import free_port
from benchmarks.support.server_process import ServerError, running_server

CASE = "served"

ANSWER_SECONDS = 300.0

FEWEST_REQUESTS = 4
"""Requests of a turn at least: a single one is over too soon, so few users ask several, one after the other."""


class _Choice(msgspec.Struct):
    token_ids: list[int]


class _Usage(msgspec.Struct):
    completion_tokens: int


class _Completion(msgspec.Struct):
    choices: list[_Choice]
    usage: _Usage


class Asker:
    """A client of one server."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def turn(self, users: int, tokens: int) -> Turn:
        """So many users ask at once, each for as many answers as come to it. Raises ServerError."""
        asked = prompts()[: max(users, FEWEST_REQUESTS)]

        async def ask(user: int) -> list[list[int]]:
            return [await self._answer(prompt, tokens) for prompt in asked[user::users]]

        began = time.monotonic()
        answers = await asyncio.gather(*map(ask, range(users)))
        seconds = time.monotonic() - began
        return Turn(answers=[answer for own in answers for answer in own], seconds=seconds)

    async def tally(self) -> DraftTally:
        """What drafts have come to so far."""
        view = msgspec.json.decode((await self._client.get("/pipeline")).content, type=PipelineView)
        return (view.engine and view.engine.drafts) or DraftCounts()

    async def _answer(self, prompt: str, tokens: int) -> list[int]:
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "return_token_ids": True}
        response = await self._client.post("/v1/completions", json=body)
        if not response.is_success:
            raise ServerError(f"The server answered {response.status_code}: {response.text[:200]}")
        completion = msgspec.json.decode(response.content, type=_Completion)
        [choice] = completion.choices
        # A stream's events would not say it: with drafts several tokens come in one.
        if not completion.usage.completion_tokens == len(choice.token_ids) == tokens:
            raise ServerError(
                f"An answer had {completion.usage.completion_tokens} tokens where {tokens} were asked for."
            )
        return choice.token_ids


async def measure_served(load: Load) -> list[DraftsRow]:
    """Measures all numbers of users on all pipelines. Raises ServerError or UnequalAnswersError."""
    rows = []
    for stages in load.stages:
        async with (
            _server(stages, "--num-speculative-tokens", str(DRAFTS)) as drafting,
            _server(stages) as plain,
        ):
            rows += [await _row(drafting, plain, stages, users, load) for users in load.users]
    return rows


async def _row(drafting: Asker, plain: Asker, stages: int, users: int, load: Load) -> DraftsRow:
    # The first turn computes the prompts, and finds out whether drafts pay.
    await drafting.turn(users, load.tokens)
    await plain.turn(users, load.tokens)
    before = await drafting.tally()
    turns = [(await drafting.turn(users, load.tokens), await plain.turn(users, load.tokens)) for _ in range(load.turns)]
    return row_of(CASE, stages, users, turns, (before, await drafting.tally()))


@asynccontextmanager
async def _server(stages: int, *options: str) -> AsyncIterator[Asker]:
    port = free_port()
    command = [sys.executable, "-m", "api.cli", "serve", "--port", str(port), "--stages", str(stages), "--no-spare"]
    with running_server([*command, "--dtype", "float32", *options], port, stages) as server:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=ANSWER_SECONDS, limits=limits) as client:
            yield Asker(client)
