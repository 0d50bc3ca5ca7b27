"""Real servers with stages that fail at certain tokens, or at all."""

import asyncio
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.poisoned_serve import PROGRAM, environment
from tests.support.servers import EXIT_DEADLINE, Server, complete, launch, sample_prompts, serving, wait_until_ready
from weights.sample import SAMPLE_DIR

VOCABULARY = json.loads((SAMPLE_DIR / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
RAISES, KILLS = VOCABULARY["ÿ"], VOCABULARY["þ"]
"""The tokens of bytes 255 and 254, which are in no UTF-8: no prompt has them, and no answer."""
TOKENS = 40
SECONDS = 500
NEIGHBOURS = 7


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, ray_cluster: Mapping[str, str]) -> Iterator[Server]:
    """A server whose second stage raises at one token, and whose first one dies at another."""
    own = {**ray_cluster, **environment(f"raise:1:{RAISES},kill:0:{KILLS}")}
    with serving(tmp_path_factory.mktemp("server"), program=PROGRAM, environment=own) as ready:
        yield ready


async def ask_poisoned(client: httpx.AsyncClient, server: Server, poison: int) -> dict[str, Any]:
    body = {"prompt": [300, poison], "max_tokens": TOKENS, "temperature": 0}
    response = await client.post(server.completions, json=body)
    assert response.status_code >= 500, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


@pytest.mark.slow
@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize(
    ("poison", "reason"),
    [
        (RAISES, "PoisonError: the device chokes on it"),
        (KILLS, "its process died"),
    ],
    ids=["raises", "dies"],
)
async def test_a_poisoned_request_ends_alone_with_the_reason(poison: int, reason: str, server: Server) -> None:
    prompts = sample_prompts()[:NEIGHBOURS]
    logged = len(server.log.read_text())
    async with httpx.AsyncClient(timeout=SECONDS) as client:

        async def neighbours() -> list[str]:
            return await asyncio.gather(
                *(complete(client, server, prompt, max_tokens=TOKENS, ignore_eos=True) for prompt in prompts)
            )

        alone = await neighbours()
        error, *together = await asyncio.gather(ask_poisoned(client, server, poison), neighbours())
        assert together == [alone]
        assert re.match(r"Stage \d failed at step \d+\.", error["message"])
        # The rest may name files: it is for the operator.
        assert reason in server.log.read_text()[logged:]
        # Nothing of it is left.
        assert await neighbours() == alone
        assert (await client.get(f"{server.url}/health")).status_code == 200


@pytest.mark.slow
@pytest.mark.timeout(SECONDS)
async def test_a_stage_that_never_makes_a_token_ends_the_server_with_the_reason(
    tmp_path: Path, ray_cluster: Mapping[str, str]
) -> None:
    own = {**ray_cluster, **environment("raise:1:all")}
    server = launch(tmp_path, "--max-restarts", "3", program=PROGRAM, environment=own)
    try:
        wait_until_ready(server)
        async with httpx.AsyncClient(timeout=SECONDS) as client:
            answers = await asyncio.gather(
                *(client.post(server.completions, json={"prompt": f"{number} boats"}) for number in range(3)),
                return_exceptions=True,
            )
        code = await asyncio.to_thread(server.process.wait, EXIT_DEADLINE)
    finally:
        if server.process.poll() is None:
            server.process.terminate()
            server.process.wait(EXIT_DEADLINE)
    assert code not in {0, None}
    said = server.log.read_text()
    # A failure that the end of a request explains does not end the server: it takes one more, or two.
    assert re.search(r"Stage 1 failed [456] times with no token made in between", said), said
    assert "PoisonError: the device chokes on it" in said
    assert all(isinstance(answer, BaseException) or answer.status_code >= 500 for answer in answers)
