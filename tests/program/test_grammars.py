"""Grammars over HTTP: answers are what was asked for, and the same ones beside others, preempted and after a loss."""

import asyncio
import json
import os
import re
import signal
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator
from prometheus_client.parser import text_string_to_metric_families

from tests.support.grammar_answers import TOKENIZER
from tests.support.servers import Server, serving

CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "size": {"type": "integer", "minimum": 0, "maximum": 5000},
        "tags": {"type": "array", "items": {"enum": ["sea", "hill", "old"]}, "maxItems": 3},
    },
    "required": ["city", "size", "tags"],
    "additionalProperties": False,
}
COMPACT = {"json": CITY, "disable_any_whitespace": True}
LINES = r"([A-Z][a-z]{2,8} [0-9]{1,3}; ){4}end"
LINE_BREAK = TOKENIZER.encode("\n", add_special_tokens=False)
"""Without it the sample model would fill its answer with indentation."""
PROMPT = "The captain looked at the sea and"
THINKING = "<｜User｜>Is it far?<｜Assistant｜><think>\n"

ASKED: list[dict[str, Any]] = [
    {
        "prompt": PROMPT,
        "seed": 1,
        "logit_bias": {str(token): -100 for token in LINE_BREAK},
        "response_format": {"type": "json_schema", "json_schema": {"name": "c", "schema": CITY}},
    },
    {"prompt": PROMPT, "seed": 2, "n": 2, "structured_outputs": {"regex": LINES}},
    {
        "prompt": "Once",
        "seed": 3,
        "structured_outputs": COMPACT,
        "repetition_penalty": 1.2,
        "logprobs": 2,
        "top_p": 0.9,
    },
    {"prompt": THINKING, "seed": 4, "guided_choice": ["yes", "no"], "thinking_token_budget": 40},
    {"prompt": "San Francisco is a", "seed": 5, "structured_outputs": {"json_object": True}, "bad_words": ["the"]},
    {"prompt": "San Francisco is a", "seed": 6},
]
COMPANY = [
    {"prompt": f"{number} boats", "seed": 100 + number, "guided_regex": f"[a-z ]{{{number + 30},90}}"}
    for number in range(20)
]
LENGTH = 90

Tokens = list[list[int]]


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as opened:
        yield opened


async def ask(client: httpx.AsyncClient, server: Server, asked: dict[str, Any]) -> dict[str, Any]:
    body = {"max_tokens": LENGTH, "temperature": 1, "return_token_ids": True, **asked}
    response = await client.post(server.completions, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def tokens(client: httpx.AsyncClient, server: Server, asked: dict[str, Any]) -> Tokens:
    return [choice["token_ids"] for choice in (await ask(client, server, asked))["choices"]]


async def among_others(client: httpx.AsyncClient, server: Server) -> list[Tokens]:
    crowd = await asyncio.gather(*(tokens(client, server, asked) for asked in [*ASKED, *COMPANY]))
    return crowd[: len(ASKED)]


async def count(client: httpx.AsyncClient, server: Server, name: str) -> float:
    families = text_string_to_metric_families((await client.get(f"{server.url}/metrics")).text)
    [sample] = [sample for family in families for sample in family.samples if sample.name == name]
    return sample.value


@dataclass(frozen=True)
class SingleStage:
    """A single stage's answers, to one request after the other and to all of them among others."""

    texts: list[list[str | None]]
    alone: list[Tokens]
    crowd: list[Tokens]
    refusal: httpx.Response
    slow_refusal: httpx.Response


@pytest.fixture(scope="module")
def single_stage(tmp_path_factory: pytest.TempPathFactory, ray_cluster: Mapping[str, str]) -> SingleStage:
    async def ask_all(server: Server) -> SingleStage:
        async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as client:
            answers = [await ask(client, server, asked) for asked in ASKED]
            chain = {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(1200)}
            deep = {"$defs": {**chain, "d1200": {}}, "$ref": "#/$defs/d0"}
            return SingleStage(
                texts=[
                    [choice["text"] if choice["finish_reason"] == "stop" else None for choice in answer["choices"]]
                    for answer in answers
                ],
                alone=[[choice["token_ids"] for choice in answer["choices"]] for answer in answers],
                crowd=await among_others(client, server),
                refusal=await client.post(
                    server.completions, json={"prompt": "a", "guided_json": {"items": {"not": {}}}}
                ),
                slow_refusal=await client.post(server.completions, json={"prompt": "a", "guided_json": deep}),
            )

    with serving(tmp_path_factory.mktemp("single"), "--stages", "1", environment=ray_cluster) as server:
        return asyncio.run(ask_all(server))


@pytest.mark.slow
def test_answers_are_what_was_asked_for(single_stage: SingleStage) -> None:
    [city], lines, [penalised], [choice], [anything], _ = single_stage.texts
    for text in (city, penalised):
        assert text is not None
        Draft202012Validator(CITY).validate(json.loads(text))
    assert all(line is not None and re.fullmatch(LINES, line) for line in lines)
    assert lines[0] != lines[1]
    assert choice is not None
    assert choice.endswith(("yes", "no"))
    assert anything is None or isinstance(json.loads(anything), dict)


@pytest.mark.slow
def test_what_cannot_be_served_is_refused(single_stage: SingleStage) -> None:
    assert single_stage.refusal.status_code == single_stage.slow_refusal.status_code == 400
    error = single_stage.refusal.json()["error"]
    assert (error["param"], "at /items/not" in error["message"]) == ("guided_json", True)
    assert "takes too much memory to compile" in single_stage.slow_refusal.json()["error"]["message"]


@pytest.mark.slow
def test_tokens_are_the_same_among_others_with_grammars(single_stage: SingleStage) -> None:
    assert single_stage.crowd == single_stage.alone


@pytest.mark.slow
async def test_tokens_are_the_same_when_requests_give_way_and_when_a_stage_is_lost(
    tmp_path: Path, client: httpx.AsyncClient, single_stage: SingleStage, ray_cluster: Mapping[str, str]
) -> None:
    options = ("--stages", "2", "--max-model-len", "128", "--num-blocks", "7")
    with serving(tmp_path, *options, environment=ray_cluster) as server:
        crowd = await asyncio.gather(*(tokens(client, server, asked) for asked in ASKED))
        assert await count(client, server, "vllm:num_preemptions_total") >= 1
        assert crowd == single_stage.alone
        running = [asyncio.create_task(tokens(client, server, asked)) for asked in ASKED]
        while await count(client, server, "vllm:num_requests_running") < len(ASKED) // 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        stages = (await client.get(f"{server.url}/pipeline")).json()["stages"]
        os.kill(stages[-1]["pid"], signal.SIGKILL)
        assert await asyncio.gather(*running) == single_stage.alone
