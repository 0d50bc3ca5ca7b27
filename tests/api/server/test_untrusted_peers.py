"""Untrusted peers at the sockets of a server's stages, while it serves and while it joins them anew."""

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.gated_serve import PROGRAM, SHUT, environment
from tests.support.servers import Server, complete, sample_prompts, serving, stage_processes
from tests.support.untrusted_peers import SECONDS, besiege, heard_anew, nobody_listens, overheard, refusals, visitors

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STAGES = 3
VICTIM = 1
PROMPTS = sample_prompts()[:6]
TOKENS = 150
FEW = 16
"""Enough to see that the server answers as before."""


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory for temporary files, with a path that is short enough for sockets."""
    made = Path(tempfile.mkdtemp(prefix="gl-", dir="/tmp"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


async def view(client: httpx.AsyncClient, server: Server) -> dict[str, Any]:
    found: dict[str, Any] = (await client.get(f"{server.url}/pipeline")).json()
    return found


async def ask_all(client: httpx.AsyncClient, server: Server, tokens: int = TOKENS) -> list[str]:
    return await asyncio.gather(
        *(complete(client, server, prompt, max_tokens=tokens, ignore_eos=True) for prompt in PROMPTS)
    )


def files(directory: Path) -> list[Path]:
    return [path for path in directory.glob("galaxyline-*/*") if path.is_socket()]


async def test_strangers_find_nobody_while_a_server_serves_and_are_refused_while_it_recovers(
    tmp_path: Path, directory: Path, ray_cluster: Mapping[str, str]
) -> None:
    own = {**ray_cluster, **environment(directory), "TMPDIR": str(directory)}
    with serving(tmp_path, "--stages", str(STAGES), program=PROGRAM, environment=own) as server:
        async with httpx.AsyncClient(timeout=SECONDS) as client:
            expected = await ask_all(client, server)
            [first] = overheard(directory)
            asking = asyncio.ensure_future(ask_all(client, server))
            while (await view(client, server))["engine"]["requests_running"] < len(PROMPTS):
                assert not asking.done()
            # A socket is there for as long as its stage waits for its neighbour, and no longer.
            nobody_listens(first.addresses)
            assert files(directory) == []
            assert (await view(client, server))["engine"]["epoch"] == first.epoch

            (directory / SHUT).touch()
            os.kill(stage_processes(server)[VICTIM].pid, signal.SIGKILL)
            second = await heard_anew(directory, first.epoch)
            silent = await asyncio.to_thread(besiege, first, second)
            assert not asking.done()
            (directory / SHUT).unlink()
            assert await asking == expected
            assert (await client.get(f"{server.url}/health")).status_code == 200
            for visitor in silent:
                assert await asyncio.to_thread(visitor.recv, 1) == b""
                visitor.close()

            after = await view(client, server)
            assert after["engine"]["epoch"] == second.epoch
            assert [stage["restarts"] for stage in after["stages"]] == [int(i == VICTIM) for i in range(STAGES)]
            nobody_listens([*first.addresses, *second.addresses])
            assert files(directory) == []
            for stage, process in enumerate(stage_processes(server)):
                assert refusals(process.pid) >= len(visitors(first, second, stage))
            said = server.log.read_text()
            assert (said.count("the pipeline failed"), said.count("the pipeline is back")) == (1, 1)
            for text, whole in zip(await ask_all(client, server, FEW), expected, strict=True):
                assert text
                assert whole.startswith(text)
