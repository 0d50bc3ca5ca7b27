"""A request's random tokens depend on it alone: not on other requests, on stages, or on preemptions."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.servers import Server, serving

LENGTH = 64
"""Tokens of an answer: two blocks and more, so that it asks for more while others do."""

ASKED: list[dict[str, Any]] = [
    {"prompt": "The captain looked at the sea and", "seed": 1},
    {"prompt": "The captain looked at the sea and", "seed": 12, "n": 3},
    {"prompt": "Once there was a village where", "seed": 3, "top_p": 0.9, "top_k": 20},
    {"prompt": "Write a letter about the harbour", "seed": 14, "repetition_penalty": 1.2, "presence_penalty": 0.5},
    {"prompt": "San Francisco is a", "seed": 5, "min_p": 0.05, "frequency_penalty": 0.3, "logit_bias": {"40": 1.5}},
]
"""Seeds whose draws stayed the same in four full batches of other requests, and four times where these gave way.

A draw in which two tokens' times are within a millionth of each other would not: float32 rounds them to either side.
"""
COMPANY = [{"prompt": f"{number} boats on the river", "seed": 100 + number} for number in range(12)]
FULL_BATCH = ("--max-num-seqs", "15")


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as opened:
        yield opened


async def answer(client: httpx.AsyncClient, server: Server, asked: dict[str, Any]) -> list[list[int]]:
    """Returns the token ids of every choice."""
    body = {"max_tokens": LENGTH, "temperature": 1, "ignore_eos": True, "return_token_ids": True, **asked}
    response = await client.post(server.completions, json=body)
    assert response.status_code == 200, response.text
    tokens = [choice["token_ids"] for choice in response.json()["choices"]]
    assert [len(choice) for choice in tokens] == [LENGTH] * asked.get("n", 1)
    return tokens


async def preemptions(client: httpx.AsyncClient, server: Server) -> float:
    """Returns how often a request was preempted, by the server's own count."""
    metrics = text_string_to_metric_families((await client.get(f"{server.url}/metrics")).text)
    [sample] = [s for family in metrics for s in family.samples if s.name == "vllm:num_preemptions_total"]
    return sample.value


@dataclass(frozen=True)
class SingleStage:
    """A single stage's answers, to one request after the other and to all of them among others."""

    alone: list[list[list[int]]]
    in_a_full_batch: list[list[list[int]]]


@pytest.fixture(scope="module")
def single_stage(tmp_path_factory: pytest.TempPathFactory, ray_cluster: Mapping[str, str]) -> SingleStage:

    async def ask(server: Server) -> SingleStage:
        async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as client:
            alone = [await answer(client, server, asked) for asked in ASKED]
            return SingleStage(alone, await answers_in_a_full_batch(client, server))

    options = ("--stages", "1", *FULL_BATCH)
    with serving(tmp_path_factory.mktemp("single"), *options, environment=ray_cluster) as server:
        return asyncio.run(ask(server))


async def answers_in_a_full_batch(client: httpx.AsyncClient, server: Server) -> list[list[list[int]]]:
    """Returns the answers to `ASKED` beside more requests than run at a time."""
    crowd = await asyncio.gather(*(answer(client, server, asked) for asked in [*ASKED, *COMPANY]))
    return crowd[: len(ASKED)]


@pytest.mark.slow
def test_seeds_and_choices_differ(single_stage: SingleStage) -> None:
    choices = [tuple(choice) for choices in single_stage.alone for choice in choices]
    assert len(set(choices)) == len(choices)


@pytest.mark.slow
def test_tokens_are_the_same_in_a_full_batch(single_stage: SingleStage) -> None:
    assert single_stage.in_a_full_batch == single_stage.alone


@pytest.mark.slow
async def test_tokens_are_the_same_in_a_full_batch_on_four_stages(
    tmp_path: Path, client: httpx.AsyncClient, single_stage: SingleStage, ray_cluster: Mapping[str, str]
) -> None:
    with serving(tmp_path, "--stages", "4", *FULL_BATCH, environment=ray_cluster) as server:
        assert await answers_in_a_full_batch(client, server) == single_stage.alone


@pytest.mark.slow
@pytest.mark.parametrize("stages", ["1", "4"])
async def test_tokens_are_the_same_when_requests_give_way_in_the_middle(
    stages: str,
    tmp_path: Path,
    client: httpx.AsyncClient,
    single_stage: SingleStage,
    ray_cluster: Mapping[str, str],
) -> None:
    """Each of the seven needs three blocks in the end and one at the beginning; there are nine blocks."""
    options = ("--stages", stages, "--max-model-len", "96", "--num-blocks", "9")
    with serving(tmp_path, *options, environment=ray_cluster) as server:
        crowd = await asyncio.gather(*(answer(client, server, asked) for asked in ASKED))
        assert await preemptions(client, server) >= 3
    assert crowd == single_stage.alone
