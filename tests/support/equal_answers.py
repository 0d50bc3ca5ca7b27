"""Requests with all kinds of options, and their answers by a server: alone, together, and while others leave."""

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from tests.support.scrape import Scrape
from tests.support.servers import Server, stage_processes

Json = dict[str, Any]

SYSTEM = "The keeper of the lighthouse writes down every boat that comes into the harbour before the fog. " * 8
LENGTH = 32
ALONE = 6
MANY = 4
SECONDS = 60
LOGPROB_TOLERANCE = 1e-4


def requests_of(kinds: list[Json], count: int = 24) -> list[Json]:
    """Prompts that begin alike and end differently, with options of each kind in turn."""
    draw = random.Random(5)
    requests = []
    for number in range(count):
        prompt = SYSTEM[: draw.choice([150, 420, 700])] + f"On day {number % 12} there were"
        kind = kinds[number % len(kinds)]
        ends = not {"guided_regex", "guided_json", "stop"}.isdisjoint(kind)
        requests.append({"prompt": prompt, "max_tokens": LENGTH, "ignore_eos": not ends, **kind})
    return requests


@asynccontextmanager
async def client_of(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    """A client with as many connections as it takes."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits, trust_env=False) as opened:
        yield opened


async def answers(server: Server, requests: list[Json]) -> list[list[Json]]:
    """Asks for the first ones alone and the rest at once, while others come and go away."""
    async with client_of(server) as client:
        alone = [await _ask(client, request) for request in requests[:ALONE]]
        leaving = [_ask_and_leave(client, request, 0.2 + 0.1 * number) for number, request in enumerate(requests[:3])]
        rest = [_ask(client, request) for request in requests[ALONE:]]
        together = await asyncio.gather(*rest, *leaving)
        return [*alone, *(answer for answer in together if answer is not None)]


async def answers_in_spite_of_a_loss(server: Server, requests: list[Json]) -> list[list[Json]]:
    """Asks as `answers` does, and kills the last stage as soon as several requests run."""
    again = asyncio.ensure_future(answers(server, requests))
    await _until_some_run(server)
    os.kill(stage_processes(server)[-1].pid, signal.SIGKILL)
    given = await again
    async with client_of(server) as client:
        view = (await client.get("/pipeline")).json()
    assert view["stages"][-1]["restarts"] == 1
    return given


async def counted(server: Server, *names: str) -> list[float]:
    """The values of vLLM's counters."""
    async with client_of(server) as client:
        scrape = Scrape((await client.get("/metrics")).text)
    return [scrape.of(f"vllm:{name}_total", engine="0", model_name="galaxyline-sample") for name in names]


async def _ask(client: httpx.AsyncClient, request: Json) -> list[Json]:
    """Returns tokens, texts and log-probabilities of the answer's choices."""
    response = await client.post("/v1/completions", json={"return_token_ids": True, **request})
    assert response.status_code == 200, response.text
    return [_answer(choice) for choice in response.json()["choices"]]


def _answer(choice: Json) -> Json:
    logprobs = choice["logprobs"] or {}
    return {
        "tokens": choice["token_ids"],
        "text": choice["text"],
        "reason": (choice["finish_reason"], choice["stop_reason"]),
        "scored": logprobs.get("tokens"),
        "logprobs": logprobs.get("token_logprobs", []),
    }


def assert_equal(given: list[list[Json]], expected: list[list[Json]]) -> None:
    """Compares answers, with log-probabilities within 1e-4."""
    for answer, other in zip(given, expected, strict=True):
        for choice, wanted in zip(answer, other, strict=True):
            assert {**choice, "logprobs": []} == {**wanted, "logprobs": []}
            for value, near in zip(choice["logprobs"], wanted["logprobs"], strict=True):
                assert value == (near if near is None else pytest.approx(near, abs=LOGPROB_TOLERANCE))


async def _ask_and_leave(client: httpx.AsyncClient, request: Json, seconds: float) -> None:
    # On a busy machine it may take longer to be connected.
    timeout = httpx.Timeout(SECONDS, read=seconds)
    with pytest.raises(httpx.ReadTimeout):
        await client.post("/v1/completions", json={**request, "max_tokens": 800}, timeout=timeout)


async def _until_some_run(server: Server) -> None:
    """Waits until several requests are in the pipeline at once."""

    async def poll() -> None:
        running = 0
        async with client_of(server) as client:
            while running < MANY:
                await asyncio.sleep(0.02)
                running = (await client.get("/pipeline")).json()["engine"]["requests_running"]

    await asyncio.wait_for(poll(), SECONDS)
