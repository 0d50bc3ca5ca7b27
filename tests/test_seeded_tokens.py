"""A request's random tokens depend on it alone: not on its company, its stages or what became of it between."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.servers import Server, serving

LENGTH = 96
"""Tokens of an answer: three blocks, so that it asks for more while others do."""

ASKED: list[dict[str, Any]] = [
    {"prompt": "The captain looked at the sea and", "seed": 1},
    {"prompt": "The captain looked at the sea and", "seed": 2, "n": 3},
    {"prompt": "Once there was a village where", "seed": 3, "top_p": 0.9, "top_k": 20},
    {"prompt": "Write a letter about the harbour", "seed": 4, "repetition_penalty": 1.2, "presence_penalty": 0.5},
    {"prompt": "San Francisco is a", "seed": 5, "min_p": 0.05, "frequency_penalty": 0.3, "logit_bias": {"40": 1.5}},
]
COMPANY = [{"prompt": f"{number} boats on the river", "seed": 100 + number} for number in range(24)]


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as opened:
        yield opened


async def answer(client: httpx.AsyncClient, server: Server, asked: dict[str, Any]) -> list[list[int]]:
    """The token ids of every choice."""
    body = {"max_tokens": LENGTH, "temperature": 1, "ignore_eos": True, "return_token_ids": True, **asked}
    response = await client.post(server.completions, json=body)
    assert response.status_code == 200, response.text
    tokens = [choice["token_ids"] for choice in response.json()["choices"]]
    assert [len(choice) for choice in tokens] == [LENGTH] * asked.get("n", 1)
    return tokens


async def preemptions(client: httpx.AsyncClient, server: Server) -> float:
    """How often a request had to give way, by the server's own count."""
    metrics = text_string_to_metric_families((await client.get(f"{server.url}/metrics")).text)
    [sample] = [s for family in metrics for s in family.samples if s.name == "vllm:num_preemptions_total"]
    return sample.value


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[list[list[int]]]:
    """The answers of a single stage to one request after the other."""

    async def ask_one_by_one() -> list[list[list[int]]]:
        async with httpx.AsyncClient(timeout=120) as client:
            return [await answer(client, server, asked) for asked in ASKED]

    with serving(tmp_path_factory.mktemp("alone"), "--stages", "1") as server:
        return asyncio.run(ask_one_by_one())


def test_seeds_and_choices_differ(alone: list[list[list[int]]]) -> None:
    assert len({tuple(choice) for choices in alone for choice in choices}) == sum(len(choices) for choices in alone)


@pytest.mark.slow
@pytest.mark.parametrize("stages", ["1", "4"])
async def test_tokens_are_the_same_in_a_full_batch(
    stages: str, tmp_path: Path, client: httpx.AsyncClient, alone: list[list[list[int]]]
) -> None:
    with serving(tmp_path, "--stages", stages, "--max-num-seqs", "20") as server:
        crowd = await asyncio.gather(*(answer(client, server, asked) for asked in [*ASKED, *COMPANY]))
    assert crowd[: len(ASKED)] == alone


@pytest.mark.slow
@pytest.mark.parametrize("stages", ["1", "4"])
async def test_tokens_are_the_same_when_requests_give_way_in_the_middle(
    stages: str, tmp_path: Path, client: httpx.AsyncClient, alone: list[list[list[int]]]
) -> None:
    """Every one of these ends up with four blocks; there are twelve for seven of them, which begin with one each."""
    with serving(tmp_path, "--stages", stages, "--max-model-len", "128", "--num-blocks", "12") as server:
        crowd = await asyncio.gather(*(answer(client, server, asked) for asked in ASKED))
        assert await preemptions(client, server) >= 3
    assert crowd == alone
