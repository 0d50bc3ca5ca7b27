"""Stages on three hosts with a Ray of their own: the text of one host, and each boundary crossed once."""

import asyncio
import itertools
import json
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import msgspec
import pytest

from api.messages.pipeline_view import PipelineView, StageView
from tests.hosts.network import CANNOT_BE_MADE, Host, network
from tests.hosts.ray_nodes import ray_cluster
from tests.hosts.tcp import connections
from tests.support.servers import Prompt, Server, sample_prompts, serving
from tests.support.untrusted_peers import is_unix, nobody_listens
from weights.model_config import ModelConfig
from weights.sample import SAMPLE_DIR

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CANNOT_BE_MADE is not None, reason=f"hosts on one machine: {CANNOT_BE_MADE}"),
]

SECONDS = 30
"""Half of what a step may take: who learns in this time that a host is gone learns it from the link."""
ROWS = {"galaxy-a": 1, "galaxy-b": 2, "galaxy-c": 1}
CHAIN = ["galaxy-a", "galaxy-b", "galaxy-b", "galaxy-c"]
STAGES = len(CHAIN)
PROMPTS = sample_prompts()[:8]
TEXTS = [prompt.text for prompt in PROMPTS]
"""Hugging Face's greedy text of each, which is that of a server on one host: see tests/program/test_end_to_end.py."""
ITEM_BYTES = 4
"""The sample model computes in float32."""

LINK_BYTES = 8192
STEP_BYTES = 400
REQUEST_BYTES = 400
TOKEN_BYTES = 8
"""More than what goes beside hidden states: of a link's handshake and signs of life, of a step, of a request and of a
token's id."""


class Hosts:
    """The head, where the server is, and the Galaxy hosts by name."""

    def __init__(self, head: Host, galaxies: Mapping[str, Host], environment: Mapping[str, str]) -> None:
        self.head = head
        self.galaxies = galaxies
        self.environment = environment


class Answers:
    """What all prompts at once were answered with, and the tokens that went through the stages for it."""

    def __init__(self, bodies: list[dict[str, Any]]) -> None:
        self.texts = [body["choices"][0]["text"] for body in bodies]
        # The last token of each answer is not computed on.
        self.tokens = sum(body["usage"]["total_tokens"] - 1 for body in bodies)


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with network(["head", *ROWS]) as (head, *galaxies):
        by_name = {host.name: host for host in galaxies}
        with ray_cluster(head, {host: ROWS[name] for name, host in by_name.items()}) as environment:
            yield Hosts(head, by_name, environment)


@pytest.fixture(scope="module")
def server(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """On the head; the stages take all rows of all other hosts."""
    folder = tmp_path_factory.mktemp("three")
    with (
        hosts.head.inside(),
        serving(folder, "--stages", str(STAGES), environment=hosts.environment) as server,
    ):
        yield server


def stages(server: Server) -> list[StageView]:
    view = msgspec.json.decode(httpx.get(f"{server.url}/pipeline", timeout=SECONDS).content, type=PipelineView)
    return view.stages


async def ask_all(server: Server) -> Answers:
    async with httpx.AsyncClient(timeout=2 * SECONDS) as client:

        async def ask(prompt: Prompt) -> dict[str, Any]:
            body = {"prompt": prompt.prompt, "max_tokens": prompt.max_tokens, "temperature": 0}
            response = await client.post(server.completions, json=body)
            assert response.status_code == 200, response.text
            answer: dict[str, Any] = response.json()
            return answer

        return Answers(await asyncio.gather(*map(ask, PROMPTS)))


def test_three_hosts_give_the_text_of_one_and_cross_each_boundary_once(hosts: Hosts, server: Server) -> None:
    answers = asyncio.run(ask_all(server))
    assert answers.texts == TEXTS
    assert len(set(answers.texts)) > 1
    chain = stages(server)
    assert [stage.host for stage in chain] == CHAIN
    assert [stage.rows for stage in chain] == [[0], [0], [1], [0]]
    assert sum(a.host != b.host for a, b in itertools.pairwise(chain)) == len(set(CHAIN)) - 1

    hidden = answers.tokens * ModelConfig.from_file(SAMPLE_DIR / "config.json").hidden_size * ITEM_BYTES
    beside = LINK_BYTES + TOKEN_BYTES * answers.tokens + REQUEST_BYTES * len(answers.texts)
    for stage in chain[:-1]:
        assert hidden < stage.sent_bytes <= hidden + beside + STEP_BYTES * stage.steps_done
    # Tokens go in and come out; hidden states do not.
    for outside in (chain[0].received_bytes, chain[-1].sent_bytes):
        assert 0 < outside <= beside + STEP_BYTES * chain[0].steps_done

    before, kernel, after = counted(hosts, server)
    for stage, following, later in zip(before, after[1:], stages(server), strict=False):
        assert stage.sent_bytes <= following.received_bytes <= later.sent_bytes
        if stage.host != following.host:
            assert stage.sent_bytes <= kernel.pop(str(stage.sent_to)) <= later.sent_bytes
    # Nothing else goes from one Galaxy host to another that might be hidden states.
    assert all(count < hidden // 10 for count in kernel.values()), kernel


def counted(hosts: Hosts, server: Server) -> tuple[list[StageView], dict[str, int], list[StageView]]:
    """What the stages have counted, before and after what the kernel has: the bytes that left one Galaxy host for
    another, whoever sent them, by the address they went to. The last ones may take a moment to be acknowledged."""
    inner = tuple(f"{host.address}:" for host in hosts.galaxies.values())
    for _ in range(20):
        before = stages(server)
        ends = [end for host in hosts.galaxies.values() for end in connections(host)]
        kernel = {end.there: end.acknowledged for end in ends if end.there.startswith(inner)}
        after = stages(server)
        if all(stage.sent_bytes <= kernel.get(str(stage.sent_to), stage.sent_bytes) for stage in before):
            break
        time.sleep(0.1)
    return before, kernel, after


def test_untrusted_peers_find_no_stage_that_listens(hosts: Hosts, server: Server) -> None:
    addresses = [str(stage.sent_to) for stage in stages(server)]
    assert [is_unix(address) for address in addresses] == [False, True, False, False]

    async def besieged() -> Answers:
        answering = asyncio.ensure_future(ask_all(server))
        for host in (hosts.head, *hosts.galaxies.values()):
            with host.inside():
                nobody_listens(addresses)
            await asyncio.sleep(0)
        return await answering

    assert asyncio.run(besieged()).texts == TEXTS
    assert httpx.get(f"{server.url}/health", timeout=SECONDS).status_code == 200
    assert "the pipeline failed" not in server.log.read_text()


def test_a_host_whose_link_fails_is_named(hosts: Hosts, server: Server) -> None:
    lost = hosts.galaxies["galaxy-b"]
    body = {"prompt": "San Francisco is a", "max_tokens": 400, "temperature": 0, "stream": True}
    try:
        with httpx.stream("POST", server.completions, json=body, timeout=SECONDS) as response:
            lines = (line for line in response.iter_lines() if line)
            assert "choices" in json.loads(next(lines).removeprefix("data: "))
            lost.set_link("down")
            deadline = time.monotonic() + SECONDS
            failed = re.compile(r"Stage [12] on galaxy-b failed (at step \d+|between steps)")
            while failed.search(said := server.log.read_text()) is None:
                assert time.monotonic() < deadline, said
                time.sleep(0.1)
    finally:
        lost.set_link("up")
