"""Clients that go away: no step issued after the abort has their requests, which give everything back."""

import asyncio
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.servers import Server, serving

CLIENTS = 12
MICROBATCHES = 3
SLOTS = 12
TOKENS = 100
DEADLINE_S = 60.0


def body(client: int) -> dict[str, Any]:
    return {"prompt": f"{client} boats on the river", "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}


async def stay(client: httpx.AsyncClient, server: Server, number: int) -> int:
    """Waits for the whole answer, and returns its number of tokens."""
    response = await client.post(server.completions, json=body(number))
    return int(response.json()["usage"]["completion_tokens"])


async def leave_a_stream(client: httpx.AsyncClient, server: Server, number: int) -> None:
    """Goes away after the first chunk of text."""
    async with client.stream("POST", server.completions, json={**body(number), "stream": True}) as response:
        await anext(response.aiter_lines())


async def leave_an_answer(client: httpx.AsyncClient, server: Server, number: int, begun: asyncio.Event) -> None:
    """Goes away while the answer is being made, before any of it has come."""
    asking = asyncio.create_task(client.post(server.completions, json=body(number)))
    await begun.wait()
    asking.cancel()
    with suppress(asyncio.CancelledError):
        await asking


async def running(client: httpx.AsyncClient, server: Server, count: int) -> dict[str, Any]:
    """Waits until so many requests run, and returns the engine's counts then."""

    async def seen() -> dict[str, Any]:
        while True:
            engine: dict[str, Any] = (await client.get(f"{server.url}/pipeline")).json()["engine"]
            if (engine["requests_running"], engine["requests_waiting"]) == (count, 0):
                return engine

    return await asyncio.wait_for(seen(), DEADLINE_S)


def events(server: Server) -> list[dict[str, Any]]:
    """Returns the lines that the processes logged, in order."""
    lines = server.log.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


@pytest.mark.slow
async def test_clients_that_leave_are_in_no_later_step_and_give_everything_back(
    tmp_path: Path, ray_cluster: Mapping[str, str]
) -> None:
    options = ("--stages", "2", "--max-num-seqs", str(SLOTS))
    with serving(tmp_path, *options, environment={**ray_cluster, "GALAXYLINE_LOG_LEVEL": "debug"}) as server:
        async with httpx.AsyncClient(timeout=DEADLINE_S, limits=httpx.Limits(max_connections=None)) as client:
            begun = asyncio.Event()
            staying = [asyncio.create_task(stay(client, server, number)) for number in range(0, CLIENTS, 2)]
            waiting = [
                asyncio.create_task(leave_an_answer(client, server, number, begun)) for number in range(1, CLIENTS, 4)
            ]
            await asyncio.gather(*(leave_a_stream(client, server, number) for number in range(3, CLIENTS, 4)))
            begun.set()
            await asyncio.gather(*waiting)
            assert await asyncio.gather(*staying) == [TOKENS] * len(staying)
            engine = await running(client, server, 0)
        assert (engine["slots_used"], engine["kv_cache_blocks_used"], engine["steps_in_flight"]) == (0, 0, 0)
    aborted: set[int] = set()
    microbatches: set[int] = set()
    slots: dict[int, int] = {}
    for event in events(server):
        if event["event"] == "request admitted":
            slots[event["request_id"]] = event["slot"]
        elif event["event"] == "request aborted":
            aborted.add(event["request_id"])
            # One that was still waiting had no slot.
            if event["request_id"] in slots:
                microbatches.add(slots[event["request_id"]] * MICROBATCHES // SLOTS)
        elif event["event"] == "step issued":
            assert not aborted & set(event["request_ids"])
    assert len(aborted) == CLIENTS // 2
    assert microbatches == set(range(MICROBATCHES))
