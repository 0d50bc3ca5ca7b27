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

from tests.support.scrape import Scrape
from tests.support.servers import Server, serving, stage_processes

pytestmark = pytest.mark.slow

Json = dict[str, Any]

SYSTEM = "The keeper of the lighthouse writes down every boat that comes into the harbour before the fog. " * 8
GRAMMAR = r"([A-Z][a-z]{2,8} [0-9]{1,3}; ){3}end"
LENGTH = 32
ALONE = 6
MANY = 4
SECONDS = 60
BLOCKS = 36
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
    for number in range(24):
        prompt = SYSTEM[: draw.choice([150, 420, 700])] + f"On day {number % 12} there were"
        kind = kinds[number % len(kinds)]
        requests.append({"prompt": prompt, "max_tokens": LENGTH, "ignore_eos": "guided_regex" not in kind, **kind})
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
        await client.post("/v1/completions", json={**request, "max_tokens": 800}, timeout=seconds)


async def answers(server: Server, requests: list[Json]) -> list[list[Json]]:
    """Asks for the first ones alone and the rest at once, while others come and go away."""
    async with client_of(server) as client:
        alone = [await ask(client, request) for request in requests[:ALONE]]
        leaving = [ask_and_leave(client, request, 0.2 + 0.1 * number) for number, request in enumerate(requests[:3])]
        rest = [ask(client, request) for request in requests[ALONE:]]
        together = await asyncio.gather(*rest, *leaving)
        return [*alone, *(answer for answer in together if answer is not None)]


async def until_some_run(server: Server) -> None:
    """Waits until several requests are in the pipeline at once."""

    async def poll() -> None:
        running = 0
        async with client_of(server) as client:
            while running < MANY:
                await asyncio.sleep(0.02)
                running = (await client.get("/pipeline")).json()["engine"]["requests_running"]

    await asyncio.wait_for(poll(), SECONDS)


@pytest.mark.parametrize("stages", [1, 4])
async def test_answers_are_those_without_the_cache_in_spite_of_preemption_and_loss(stages: int, tmp_path: Path) -> None:
    options = ("--stages", str(stages), "--dtype", "float32", "--max-model-len", "1100")
    requests = asked()
    (tmp_path / "without").mkdir()
    (tmp_path / "with").mkdir()
    with serving(tmp_path / "without", *options, "--no-enable-prefix-caching", "--kv-host-memory", "0") as server:
        expected = await answers(server, requests)
    shared = {request["prompt"] for request in requests}
    assert len(shared) > 8
    with serving(tmp_path / "with", *options, "--num-blocks", str(BLOCKS), "--kv-host-memory", "64M") as server:
        assert await answers(server, requests) == expected
        async with client_of(server) as client:
            scrape = Scrape((await client.get("/metrics")).text)
        hits, queries, preemptions = (
            scrape.of(f"vllm:{name}_total", engine="0", model_name="galaxyline-sample")
            for name in ("prefix_cache_hits", "prefix_cache_queries", "num_preemptions")
        )
        assert hits / queries > 0.3
        assert preemptions > 0
        again = asyncio.ensure_future(answers(server, requests))
        await until_some_run(server)
        os.kill(stage_processes(server)[-1].pid, signal.SIGKILL)
        assert await again == expected
        async with client_of(server) as client:
            view = (await client.get("/pipeline")).json()
        assert view["stages"][-1]["restarts"] == 1
