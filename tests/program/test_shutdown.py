"""Real servers that are ended: what their clients get, how they exit, and that nothing is left of them."""

import asyncio
import contextlib
import os
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support.servers import (
    EXIT_DEADLINE,
    READY_DEADLINE,
    Server,
    launch,
    sample_prompts,
    stage_processes,
    stream,
    wait_until_ready,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SECONDS = 120
PROMPTS = sample_prompts()[:6]
TOKENS = 64
SHARED_MEMORY = "/dev/shm/"
LONG = ("--device", "timed", "--stage-time", "50", "--stages", "2")
"""Options with which ENDLESS takes half a minute, on any machine."""
ENDLESS = {"prompt": "San Francisco is a", "max_tokens": 300, "ignore_eos": True, "stream": True}
WAYS = {"SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}
DRAINED = {"SIGTERM": 0, "Ctrl-C": 130}
"""Exit codes of a server that could end all its requests."""


class Traces:
    """What a server may leave behind; it and all that it starts have a directory of their own for temporary files."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.environment = {"TMPDIR": str(directory), "RAY_ADDRESS": "local"}
        self._shared_memory: set[str] = set()

    def processes(self) -> list[psutil.Process]:
        """All processes with that directory, whoever started them."""
        found = []
        for process in psutil.process_iter():
            # Those that end meanwhile, and zombies, have nothing to read.
            with contextlib.suppress(psutil.Error):
                if process.environ().get("TMPDIR") == str(self._directory):
                    found.append(process)
        return found

    def note_shared_memory(self) -> None:
        """Notes what the processes have mapped; to be called while the server runs."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                self._shared_memory |= {area.path for area in process.memory_maps() if SHARED_MEMORY in area.path}

    def left(self) -> list[str]:
        """Processes, sockets, our own directories and shared memory that are still there."""
        files = [path for path in self._directory.rglob("*") if stat.S_ISSOCK(path.lstat().st_mode)]
        files += [*self._directory.glob("galaxyline-*"), *filter(Path.exists, map(Path, self._shared_memory))]
        return [*map(str, files), *(f"{process.pid} {process.name()}" for process in self.processes())]

    def end_all(self) -> None:
        """Kills what is left, so that a test that fails leaves nothing."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.fixture
def traces() -> Iterator[Traces]:
    parent = Path(tempfile.mkdtemp(prefix="gl-", dir="/tmp"))  # Sockets need a short path.
    directory = parent / "t"
    directory.mkdir()
    kept = Traces(directory)
    yield kept
    kept.end_all()
    shutil.rmtree(parent, ignore_errors=True)


def press(server: Server, number: signal.Signals) -> None:
    """SIGTERM comes to the process; Ctrl-C to the foreground's group, which is the server's own."""
    if number == signal.SIGINT:
        os.killpg(server.process.pid, number)
    else:
        server.process.send_signal(number)


async def exit_code(server: Server, within: float = EXIT_DEADLINE) -> int:
    return await asyncio.to_thread(server.process.wait, within)


def until(holds: Callable[[], bool], server: Server) -> None:
    """Returns when it holds; fails with the server's log if it does not in time."""
    deadline = time.monotonic() + READY_DEADLINE
    while not holds():
        assert server.process.poll() is None, server.log.read_text()
        assert time.monotonic() < deadline, server.log.read_text()
        time.sleep(0.02)


async def until_running(client: httpx.AsyncClient, server: Server, count: int) -> None:
    """Returns when so many requests have a slot."""
    while (await client.get(f"{server.url}/pipeline")).json()["engine"]["requests_running"] < count:
        assert server.process.poll() is None


async def until_draining(client: httpx.AsyncClient, server: Server) -> None:
    while (await client.get(f"{server.url}/health")).status_code != 503:
        assert server.process.poll() is None


async def refusal(client: httpx.AsyncClient, server: Server) -> httpx.Response:
    return await client.post(server.completions, json={"prompt": "One more", "max_tokens": 1})


async def last_lines(client: httpx.AsyncClient, server: Server) -> list[str]:
    """The last two lines of a stream that does not end in time."""
    async with client.stream("POST", server.completions, json=ENDLESS) as response:
        assert response.status_code == 200
        return [line async for line in response.aiter_lines() if line][-2:]


@pytest.mark.parametrize("way", list(WAYS))
async def test_requests_in_flight_end_whole_and_nothing_is_left(way: str, tmp_path: Path, traces: Traces) -> None:
    server = launch(tmp_path, "--shutdown-timeout", str(SECONDS), environment=traces.environment)
    wait_until_ready(server)
    async with httpx.AsyncClient(timeout=SECONDS) as client:

        async def texts() -> list[list[str]]:
            return await asyncio.gather(*(stream(client, server, prompt, **fields()) for prompt in PROMPTS))

        before = await texts()
        # All that requests need is mapped by now, and to look takes longer than the next ones leave time for.
        traces.note_shared_memory()
        asking = asyncio.ensure_future(texts())
        await until_running(client, server, len(PROMPTS))
        press(server, WAYS[way])
        await until_draining(client, server)
        refused = await refusal(client, server)
        assert not asking.done()
        assert ["".join(pieces) for pieces in await asking] == ["".join(pieces) for pieces in before]
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
    assert "draining" in refused.json()["error"]["message"]
    assert await exit_code(server) == DRAINED[way]
    assert traces.left() == []


def fields() -> dict[str, Any]:
    return {"max_tokens": TOKENS, "ignore_eos": True}


def left_of(stages: Sequence[psutil.Process]) -> list[str]:
    """The processes of stages in a Ray cluster that others share which have not ended after their server."""
    _, alive = psutil.wait_procs(stages, timeout=EXIT_DEADLINE)
    return [str(process.pid) for process in alive]


async def test_what_does_not_end_in_time_ends_with_an_error(
    tmp_path: Path, traces: Traces, ray_cluster: Mapping[str, str]
) -> None:
    own = {**traces.environment, **ray_cluster}
    server = launch(tmp_path, *LONG, "--shutdown-timeout", "0.5", environment=own)
    wait_until_ready(server)
    stages = stage_processes(server)
    async with httpx.AsyncClient(timeout=SECONDS) as client:
        asking = [asyncio.ensure_future(last_lines(client, server)) for _ in range(4)]
        await until_running(client, server, len(asking))
        traces.note_shared_memory()
        press(server, signal.SIGTERM)
        for error, end in await asyncio.gather(*asking):
            assert "The engine was closed." in error
            assert end == "data: [DONE]"
    assert await exit_code(server) == 128 + signal.SIGTERM
    assert [*traces.left(), *left_of(stages)] == []


async def test_a_second_ctrl_c_ends_the_wait(tmp_path: Path, traces: Traces, ray_cluster: Mapping[str, str]) -> None:
    own = {**traces.environment, **ray_cluster}
    server = launch(tmp_path, *LONG, "--shutdown-timeout", "10000", environment=own)
    wait_until_ready(server)
    stages = stage_processes(server)
    async with httpx.AsyncClient(timeout=SECONDS) as client:
        asking = asyncio.ensure_future(last_lines(client, server))
        await until_running(client, server, 1)
        traces.note_shared_memory()
        press(server, signal.SIGINT)
        await until_draining(client, server)
        assert not asking.done()
        press(server, signal.SIGINT)
        [error, end] = await asking
    assert "The engine was closed." in error
    assert end == "data: [DONE]"
    assert await exit_code(server) == 128 + signal.SIGINT
    assert [*traces.left(), *left_of(stages)] == []
