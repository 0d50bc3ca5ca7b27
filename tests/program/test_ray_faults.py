"""A server that loses the head of the Ray cluster that it has joined."""

import asyncio
from pathlib import Path

import httpx
import pytest

from tests.support.ray_nodes import SECONDS, head_of_a_cluster
from tests.support.servers import EXIT_DEADLINE, Server, complete, launch, sample_prompts, wait_until_ready

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * SECONDS)]

TOKENS = 80
PROMPTS = sample_prompts()[:4]


async def ask_all(client: httpx.AsyncClient, server: Server) -> list[str]:
    return await asyncio.gather(
        *(complete(client, server, prompt, max_tokens=TOKENS, ignore_eos=True) for prompt in PROMPTS)
    )


async def running(client: httpx.AsyncClient, server: Server) -> int:
    """Returns the number of requests that have a slot."""
    return int((await client.get(f"{server.url}/pipeline")).json()["engine"]["requests_running"])


async def test_tokens_in_flight_go_on_without_rays_head(tmp_path: Path) -> None:
    with head_of_a_cluster(rows=2) as cluster:
        server = launch(tmp_path, environment=cluster.environment)
        try:
            wait_until_ready(server)
            async with httpx.AsyncClient(timeout=SECONDS) as client:
                before = await ask_all(client, server)
                asking = asyncio.ensure_future(ask_all(client, server))
                while await running(client, server) < len(PROMPTS):
                    assert not asking.done()
                head = cluster.process("gcs_server")
                head.kill()
                head.wait(SECONDS)
                assert not asking.done()
                assert await asking == before
                assert (await client.get(f"{server.url}/health")).status_code == 200
            # Ray ends every process of a cluster that has been without its head for too long: so does the server.
            code = await asyncio.to_thread(server.process.wait, SECONDS)
        finally:
            if server.process.poll() is None:
                server.process.kill()
                server.process.wait(EXIT_DEADLINE)
    assert code not in {0, None}
    assert "Failed to connect to GCS" in server.log.read_text()
