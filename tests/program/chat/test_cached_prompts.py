"""Prompts that are asked again on a real server: found, kept apart, forgotten, and answered alike in any case."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.support.scrape import Scrape
from tests.support.servers import Server

BLOCK = 32
PROMPT = "The lighthouse keeper counts the boats on the river before the fog comes down from the hills. " * 6
"""A prompt of more than two blocks."""

Json = dict[str, Any]

pytestmark = pytest.mark.slow


@pytest.fixture
async def http(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server in whose cache nothing is found."""
    async with httpx.AsyncClient(base_url=server.url, timeout=120, trust_env=False) as opened:
        await reset(opened)
        yield opened


async def reset(http: httpx.AsyncClient) -> None:
    response = await http.post("/reset_prefix_cache")
    assert (response.status_code, response.content) == (200, b"")


async def post(http: httpx.AsyncClient, path: str, **body: Any) -> Json:
    response = await http.post(path, json=body)
    assert response.status_code == 200, response.text
    answer: Json = response.json()
    return answer


async def completion(http: httpx.AsyncClient, **fields: Any) -> tuple[str, int]:
    """Returns the text and the cached tokens."""
    body = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0, "ignore_eos": True, **fields}
    answer = await post(http, "/v1/completions", **body)
    usage = answer["usage"]
    assert usage["prompt_tokens"] > 2 * BLOCK
    cached: int = usage["prompt_tokens_details"]["cached_tokens"]
    assert 0 <= cached < usage["prompt_tokens"]
    assert cached % BLOCK == 0
    return answer["choices"][0]["text"], cached


async def test_a_prompt_is_found_again_by_those_alone_who_may_know_of_it(http: httpx.AsyncClient) -> None:
    first, again, other, own = [await completion(http, cache_salt=salt) for salt in (None, None, "other", "other")]
    await reset(http)
    after = await completion(http)
    assert len({text for text, _ in (first, again, other, own, after)}) == 1
    assert [cached for _, cached in (first, other, after)] == [0, 0, 0]
    assert again[1] == own[1] >= 2 * BLOCK


async def test_a_prompt_that_is_scored_is_computed_whole_and_scored_alike(http: httpx.AsyncClient) -> None:
    scores = []
    for _ in range(2):
        answer = await post(http, "/v1/completions", prompt=PROMPT, max_tokens=1, temperature=0, prompt_logprobs=0)
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        scores.append(answer["choices"][0]["prompt_logprobs"])
    assert scores[0] == scores[1]
    # What it has filled is found by others.
    assert (await completion(http))[1] >= 2 * BLOCK


async def test_the_next_turn_of_a_conversation_finds_the_one_before_on_every_route(http: httpx.AsyncClient) -> None:
    turns = [{"role": "user", "content": PROMPT}]
    bodies: dict[str, Json] = {
        "/v1/chat/completions": {"messages": turns, "max_tokens": 8},
        "/v1/responses": {"input": turns, "max_output_tokens": 16},
        "/v1/messages": {"messages": turns, "max_tokens": 8},
    }
    usages = [(await post(http, path, temperature=0, **body))["usage"] for path, body in bodies.items()]
    chat, responses, messages = usages
    cached = responses["input_tokens_details"]["cached_tokens"]
    assert chat["prompt_tokens_details"] == {"cached_tokens": 0}
    assert cached >= 2 * BLOCK
    assert cached % BLOCK == 0
    assert responses["input_tokens"] == chat["prompt_tokens"] > cached
    assert messages["cache_read_input_tokens"] == cached
    assert messages["input_tokens"] == chat["prompt_tokens"] - cached


async def test_what_answers_say_is_what_metrics_and_pipeline_count(http: httpx.AsyncClient) -> None:
    labels = {"model_name": "galaxyline-sample", "engine": "0"}

    async def counted() -> tuple[float, float]:
        scrape = Scrape((await http.get("/metrics")).text)
        engine = (await http.get("/pipeline")).json()["engine"]
        figures = [scrape.of(f"vllm:prefix_cache_{name}_total", **labels) for name in ("queries", "hits")]
        assert figures == [engine["prefix_cache_queries"], engine["prefix_cache_hits"]]
        assert scrape.of("galaxyline:prefix_cache_blocks", **labels) == engine["prefix_cache_blocks"]
        return figures[0], figures[1]

    before = await counted()
    await completion(http)
    _, cached = await completion(http)
    after = await counted()
    assert after[1] - before[1] == cached
    assert after[0] - before[0] > 2 * cached
