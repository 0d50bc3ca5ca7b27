"""A host leaves the cluster: its stages find rows elsewhere, once there are some."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import pytest

from tests.hosts.moving import SAID
from tests.hosts.network import CANNOT_BE_MADE, Host, network
from tests.hosts.ray_nodes import ray_cluster
from tests.support.gated_serve import PROGRAM, SHUT, environment
from tests.support.greetings import UNTRUSTED
from tests.support.servers import Server, complete, launch, sample_prompts, serving, wait_until_ready
from tests.support.untrusted_peers import besiege, heard_anew, is_unix, nobody_listens, overheard, refusals

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CANNOT_BE_MADE is not None, reason=f"hosts on one machine: {CANNOT_BE_MADE}"),
]

SECONDS = 60
NAMES = ["left", "middle", "right"]
PROMPTS = sample_prompts()[:6]
TOKENS = 150
FEW = 16
"""Enough to see that the server answers as before."""


Visited = TypeVar("Visited")


class Hosts:
    """The head and the others, which have two rows each, and what a process of the head's joins them with."""

    def __init__(self, head: Host, others: Sequence[Host], environment: Mapping[str, str]) -> None:
        self.head = head
        self.others = {host.name: host for host in others}
        self.environment = dict(environment)

    def visit(self, name: str, then: Callable[[], Visited]) -> Visited:
        """What comes of it on that host."""
        with self.others[name].inside():
            return then()


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """Every test loses one, and leaves the others."""
    with (
        network(["head", *NAMES]) as (head, *others),
        ray_cluster(head, dict.fromkeys(others, 2)) as environment,
    ):
        yield Hosts(head, others, environment)


async def view(client: httpx.AsyncClient, server: Server) -> dict[str, Any]:
    found: dict[str, Any] = (await client.get(f"{server.url}/pipeline")).json()
    return found


async def ask_all(client: httpx.AsyncClient, server: Server, tokens: int = TOKENS) -> list[str]:
    return await asyncio.gather(
        *(complete(client, server, prompt, max_tokens=tokens, ignore_eos=True) for prompt in PROMPTS)
    )


async def lose_raylet(hosts: Hosts, server: Server, gate: Path) -> None:
    """Two of three stages are on one host; the third one's host loses what makes it one of the cluster's.

    While the stages wait to be joined anew, peers come to their sockets from the host that is new among them.
    """
    async with httpx.AsyncClient(timeout=4 * SECONDS) as client:
        expected = await ask_all(client, server)
        before = (await view(client, server))["stages"]
        staying, _, lost = [stage["host"] for stage in before]
        [free] = {*NAMES} - {staying, lost}
        assert [stage["host"] for stage in before] == [staying, staying, lost]
        asking = asyncio.ensure_future(ask_all(client, server))
        while (await view(client, server))["engine"]["requests_running"] < len(PROMPTS):
            assert not asking.done()
        [first] = overheard(gate)
        assert [is_unix(address) for address in first.addresses] == [False, True, False]
        hosts.visit(free, lambda: nobody_listens(first.addresses))
        gone = psutil.Process(before[2]["pid"])
        (gate / SHUT).touch()
        [raylet] = [process for process in hosts.others[lost].processes() if process.name() == "raylet"]
        raylet.kill()
        second = await heard_anew(gate, first.epoch)
        silent = await asyncio.to_thread(hosts.visit, free, lambda: besiege(first, second))
        (gate / SHUT).unlink()
        assert await asking == expected
        after = (await view(client, server))["stages"]
        assert [stage["host"] for stage in after] == [staying, staying, free]
        assert [stage["pid"] for stage in after[:2]] == [stage["pid"] for stage in before[:2]]
        assert [stage["restarts"] > 0 for stage in after] == [False, False, True]
        assert (await client.get(f"{server.url}/health")).status_code == 200
        for text, whole in zip(await ask_all(client, server, FEW), expected, strict=True):
            assert text
            assert whole.startswith(text)
    for visitor in silent:
        assert visitor.recv(1) == b""
        visitor.close()
    assert all(refusals(stage["pid"]) >= len(UNTRUSTED) for stage in after)
    gone.wait(SECONDS)
    # Whether its process died or does not answer is more than anybody can know before Ray does.
    assert f'"error": "Stage 2 on {lost} failed ' in server.log.read_text()


def test_a_server_whose_host_loses_its_raylet_goes_on_with_rows_of_another(hosts: Hosts, tmp_path: Path) -> None:
    own = {**hosts.environment, **environment(tmp_path)}
    with hosts.head.inside(), serving(tmp_path, "--stages", "3", program=PROGRAM, environment=own) as server:
        asyncio.run(lose_raylet(hosts, server, tmp_path))


def said(lines: Iterable[str]) -> list[Any]:
    return [json.loads(line.removeprefix(SAID)) for line in lines if line.startswith(SAID)]


def test_stages_of_a_lost_host_find_other_rows(hosts: Hosts) -> None:
    with subprocess.Popen(
        hosts.head.command(sys.executable, "-m", "tests.hosts.moving"),
        env=hosts.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        [[staying, moving]] = said([process.stdout.readline()])
        [[kept, _], [lost, _]] = staying[0], moving[0]
        assert kept != lost
        assert (staying, moving) == ([[kept, [0]], [kept, [1]]], [[lost, [0]], [lost, [1]]])
        hosts.others[lost].switch_off()
        rest, _ = process.communicate("\n", timeout=2 * SECONDS)
        refused, found = said(rest.splitlines())
        assert process.returncode == 0
    assert "2 stages of 1 rows need 2 Galaxy rows, and they were not free" in refused
    assert f"the cluster has 2: {kept} (2, 2 in use)" in refused
    assert found == [[kept, [0]], [kept, [1]]]


def test_a_server_whose_last_rows_are_lost_says_so_and_ends(hosts: Hosts, tmp_path: Path) -> None:
    """Runs last: it takes the host that the others have left."""
    with hosts.head.inside():
        server = launch(tmp_path, "--placement-timeout", "2", environment=hosts.environment)
        try:
            wait_until_ready(server)
            stages = httpx.get(f"{server.url}/pipeline", timeout=SECONDS).json()["stages"]
            [last] = {stage["host"] for stage in stages}
            [raylet] = [process for process in hosts.others[last].processes() if process.name() == "raylet"]
            raylet.kill()
            code = server.process.wait(2 * SECONDS)
        finally:
            server.process.kill()
    log = server.log.read_text()
    assert code == 2, log
    assert f'"hosts": ["{last}"], "stages": [0, 1], "event": "hosts have left the cluster' in log
    assert "Error: 2 stages of 1 rows need 2 Galaxy rows, and they were not free within 2 s: no host" in log
