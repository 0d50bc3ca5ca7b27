"""Real servers with two replicas of the sample model: the text of one, and what remains when one of them dies."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.support.ports import free_port
from tests.support.scrape import Scrape
from tests.support.servers import Prompt, Server, complete, sample_prompts, serving

SECONDS = 60.0
PROMPTS = sample_prompts()[:12]
EXPECTED = [prompt.text for prompt in PROMPTS]
"""Hugging Face\'s greedy text of every prompt."""
STAGES = 2
TOKENS = 400
"""Length of answers that are being made when a replica dies: the server takes seconds to show that both work."""
OPTIONS = ("--replicas", "2", "--stages", str(STAGES))

pytestmark = pytest.mark.slow


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as opened:
        yield opened


async def pipeline(client: httpx.AsyncClient, server: Server) -> dict[str, Any]:
    """Returns the server's view of its engines and stages."""
    view: dict[str, Any] = (await client.get(f"{server.url}/pipeline")).json()
    return view


async def running(client: httpx.AsyncClient, server: Server, counts: list[int]) -> None:
    """Waits until each replica has so many requests in slots."""
    while True:
        replicas = (await pipeline(client, server))["replicas"]
        # An engine that is busy may take longer to answer than it gets.
        if [replica["engine"] and replica["engine"]["requests_running"] for replica in replicas] == counts:
            return
        await asyncio.sleep(0.02)


async def failed(client: httpx.AsyncClient, server: Server, replica: int) -> dict[str, Any]:
    """Waits until this replica has failed; returns the server's view then."""
    while (view := await pipeline(client, server))["replicas"][replica]["phase"] != "failed":
        pass
    return view


def ended_by(scrape: Scrape, engine: str) -> float:
    """Returns the number of requests that an engine has completed."""
    labels = {"model_name": "galaxyline-sample", "engine": engine}
    return sum(
        scrape.of("vllm:request_success_total", finished_reason=reason, **labels) for reason in ("stop", "length")
    )


async def shown(server: Server) -> str:
    """Returns what `galaxyline status` prints, as one line."""
    command = [sys.executable, "-m", "api.cli", "status", "--url", server.url]
    return " ".join((await asyncio.to_thread(subprocess.check_output, command, text=True, timeout=SECONDS)).split())


async def check_survivor(client: httpx.AsyncClient, server: Server, pid: int, reason: str) -> None:
    """Kills the process `pid` of the first replica while both work; its `reason` is shown, and the other serves on."""
    long = [Prompt(f"{number} boats on the sea", TOKENS, False) for number in range(4)]
    requests = [asyncio.create_task(complete(client, server, prompt, ignore_eos=True)) for prompt in long]
    await asyncio.wait_for(running(client, server, [2, 2]), SECONDS)
    os.kill(pid, signal.SIGKILL)
    answers = await asyncio.gather(*requests, return_exceptions=True)
    assert sum(isinstance(answer, str) for answer in answers) >= 2
    view = await asyncio.wait_for(failed(client, server, 0), SECONDS)
    assert (view["phase"], view["replicas"][1]["phase"]) == ("ready", "ready")
    assert view["detail"].startswith("Replica 0: ")
    assert [(stage["replica"], stage["stage"]) for stage in view["stages"]] == [(1, stage) for stage in range(STAGES)]
    assert (await client.get(f"{server.url}/health")).status_code == 200
    assert await asyncio.gather(*(complete(client, server, prompt) for prompt in PROMPTS)) == EXPECTED
    scrape = Scrape((await client.get(f"{server.url}/metrics")).text)
    assert [scrape.of("galaxyline:engine_up", engine=str(replica)) for replica in range(2)] == [0, 1]
    table = await shown(server)
    assert reason in view["replicas"][0]["detail"]
    assert f"replica 0: failed. {view['replicas'][0]['detail']}" in table
    assert "replica 1: ready" in table


async def test_two_replicas_in_one_cluster_give_the_text_of_one_and_a_killed_engine_is_survived(
    tmp_path: Path, client: httpx.AsyncClient, ray_cluster: Mapping[str, str]
) -> None:
    with serving(tmp_path, *OPTIONS, environment=ray_cluster) as server:
        texts = await asyncio.gather(*(complete(client, server, prompt) for prompt in [*PROMPTS, *PROMPTS]))
        assert texts == [*EXPECTED, *EXPECTED]
        view = await pipeline(client, server)
        assert [(stage["replica"], stage["stage"]) for stage in view["stages"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
        assert len({stage["pid"] for stage in view["stages"]}) == 2 * STAGES
        scrape = Scrape((await client.get(f"{server.url}/metrics")).text)
        ended = [ended_by(scrape, engine) for engine in ("0", "1")]
        assert sum(ended) == 2 * len(PROMPTS)
        assert min(ended) >= len(PROMPTS) // 2
        pid = view["replicas"][0]["engine"]["pid"]
        await check_survivor(client, server, pid, "The engine process was killed by signal 9")


async def test_a_killed_stage_of_one_replica_with_a_cluster_of_its_own_is_survived_by_the_other(
    tmp_path: Path, client: httpx.AsyncClient
) -> None:
    with serving(tmp_path, *OPTIONS, "--max-restarts", "0") as server:
        pid = (await pipeline(client, server))["stages"][1]["pid"]
        await check_survivor(client, server, pid, "Stage 1 ")


def test_a_cluster_without_room_for_all_replicas_is_refused_at_once(
    tmp_path: Path, ray_cluster: Mapping[str, str]
) -> None:
    command = [sys.executable, "-m", "api.cli", "serve", "--port", str(free_port()), "--cache-dir", str(tmp_path)]
    ran = subprocess.run(
        [*command, "--replicas", "5", "--stages", "2"],
        env={**os.environ, **ray_cluster},
        check=False,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert ran.returncode == 2, ran.stderr
    assert ran.stderr.strip().splitlines()[-1].startswith("Error: Replica ")
    assert "10 stages of 1 rows need 10 Galaxy rows" in ran.stderr
