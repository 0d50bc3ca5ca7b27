"""Answers of a server with the prefix cache equal those of one without, whatever happens to both of them."""

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.prefix.asking import Asker
from tests.support.servers import Server, serving, stage_processes

pytestmark = pytest.mark.slow

Json = dict[str, Any]

SYSTEM = "The keeper of the lighthouse writes down every boat that comes into the harbour before the fog. " * 8
GRAMMAR = r"([A-Z][a-z]{2,8} [0-9]{1,3}; ){3}end"
LENGTH = 60
BLOCKS = 100
"""Too few for all requests at once: some have to give way."""


def asked() -> list[Json]:
    """Prompts that begin alike and end differently, with all kinds of options."""
    kinds: list[Json] = [
        {"temperature": 0},
        {"temperature": 1, "seed": 14},
        {"temperature": 1, "seed": 12, "n": 2, "top_p": 0.9},
        {"temperature": 0, "logprobs": 3},
        {"temperature": 1, "seed": 12, "guided_regex": GRAMMAR},
        {"temperature": 0, "repetition_penalty": 1.2, "presence_penalty": 0.3},
        {"temperature": 0, "prompt_logprobs": 1},
        {"temperature": 0, "cache_salt": "of another tenant"},
    ]
    draw = random.Random(5)
    requests = []
    for number in range(32):
        prompt = SYSTEM[: draw.choice([150, 420, 700])] + f"On day {number % 12} there were"
        requests.append({"prompt": prompt, "max_tokens": LENGTH, "ignore_eos": True, **kinds[number % len(kinds)]})
    return requests


@asynccontextmanager
async def client_of(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits, trust_env=False) as opened:
        yield opened


async def ask(client: httpx.AsyncClient, request: Json) -> list[Json]:
    """Returns tokens and log-probabilities of the answer's choices."""
    response = await client.post("/v1/completions", json={"return_token_ids": True, **request})
    assert response.status_code == 200, response.text
    choices: list[Json] = response.json()["choices"]
    return [{"tokens": choice["token_ids"], "logprobs": (choice["logprobs"] or {}).get("tokens")} for choice in choices]


async def ask_and_leave(client: httpx.AsyncClient, request: Json, seconds: float) -> None:
    with pytest.raises(httpx.ReadTimeout):
        await client.post("/v1/completions", json={**request, "max_tokens": 1000}, timeout=seconds)


async def answers(server: Server, requests: list[Json]) -> list[list[Json]]:
    """Asks in the given order, the first half alone and the rest at once, while others come and go away."""
    async with client_of(server) as client:
        alone = [await ask(client, request) for request in requests[: len(requests) // 2]]
        leaving = [ask_and_leave(client, request, 0.2 + 0.1 * number) for number, request in enumerate(requests[:4])]
        rest = [ask(client, request) for request in requests[len(requests) // 2 :]]
        together = await asyncio.gather(*rest, *leaving)
        return [*alone, *(answer for answer in together if answer is not None)]


@pytest.mark.parametrize("stages", [1, 4])
async def test_answers_are_those_without_the_cache_in_spite_of_preemption_and_loss(stages: int, tmp_path: Path) -> None:
    options = ("--stages", str(stages), "--dtype", "float32", "--max-model-len", "1500")
    requests = asked()
    (tmp_path / "without").mkdir()
    (tmp_path / "with").mkdir()
    with serving(tmp_path / "without", *options, "--no-enable-prefix-caching", "--kv-host-memory", "0") as server:
        expected = await answers(server, requests)
    shared = {request["prompt"] for request in requests}
    assert len(shared) > 8
    with serving(tmp_path / "with", *options, "--num-blocks", str(BLOCKS), "--kv-host-memory", "64M") as server:
        assert await answers(server, requests) == expected
        backwards = await answers(server, requests[::-1])
        assert backwards[::-1] == expected
        async with Asker(server.url) as asker:
            counted = await asker.counters()
        assert counted.hit_rate > 0.3
        again = asyncio.ensure_future(answers(server, requests))
        await asyncio.sleep(1)
        os.kill(stage_processes(server)[-1].pid, signal.SIGKILL)
        assert await again == expected
