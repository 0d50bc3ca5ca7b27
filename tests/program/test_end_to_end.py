"""The whole program, from HTTP to tokens and back, against Hugging Face's greedy text of the sample model."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import httpx
import pytest

from tests.support.servers import Prompt, complete, sample_prompts, serving, stream

PROMPTS = sample_prompts()
EXPECTED = [prompt.text for prompt in PROMPTS]
"""Hugging Face\'s greedy text of every prompt."""
LAYERS = 6
CLIENTS = 64
FEW = 8
"""Tokens of an answer alone on several stages: the same are decoded for the crowd, whose answers are whole."""
OF_ALL_LENGTHS = [*range(6), *range(22, 35, 6)]
"""Some prompts of a line each, and some of hundreds of tokens."""


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as opened:
        yield opened


async def test_the_first_answer(tmp_path: Path, client: httpx.AsyncClient) -> None:
    """`galaxyline serve` with no options, and the request that it prints."""
    with serving(tmp_path) as server:
        [model] = (await client.get(f"{server.url}/v1/models")).json()["data"]
        request = {"model": model["id"], "prompt": "San Francisco is a", "max_tokens": 32}
        sampling = {"temperature": 0, "top_p": 0.9, "top_k": 10}
        response = await client.post(server.completions, json={**request, **sampling})
        pieces = await stream(client, server, Prompt("San Francisco is a", 32, True))
        assert f"curl {server.completions}" in server.log.read_text()
    answer = response.json()
    text = answer["choices"][0]["text"]
    assert text == "".join(pieces)
    assert answer["usage"]["completion_tokens"] == 32
    assert len(pieces) > 16
    assert len(text.split()) >= 16


@pytest.mark.slow
async def test_a_prompt_of_the_whole_length_is_scored_as_on_a_server_of_greater_length(
    tmp_path: Path, client: httpx.AsyncClient, ray_cluster: Mapping[str, str]
) -> None:
    length = 64
    tokens = [(7 * place + 5) % 1000 for place in range(length)]
    body = {"prompt": [tokens], "echo": True, "logprobs": 3, "max_tokens": 0}
    scores = []
    for most in (length, 2 * length):
        folder = tmp_path / str(most)
        folder.mkdir()
        with serving(folder, "--max-model-len", str(most), "--stages", "1", environment=ray_cluster) as server:
            answer = (await client.post(server.completions, json=body)).json()
            usage = {"prompt_tokens": length, "completion_tokens": 0, "total_tokens": length}
            assert answer["usage"] == {**usage, "prompt_tokens_details": {"cached_tokens": 0}}
            longer = await client.post(server.completions, json={**body, "max_tokens": most - length + 1})
            assert longer.status_code == 400
            scores.append(answer["choices"][0]["logprobs"])
    assert scores[0] == scores[1]
    assert [logprob is None for logprob in scores[0]["token_logprobs"]] == [True] + [False] * (length - 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stages", "chunk", "flags"), [(1, 32, []), (2, 77, []), (3, 160, ["--enable-trace"]), (LAYERS, 4096, [])]
)
async def test_greedy_text_is_the_same_on_any_number_of_stages_with_any_prefill_chunk(
    stages: int,
    chunk: int,
    flags: list[str],
    tmp_path: Path,
    client: httpx.AsyncClient,
    ray_cluster: Mapping[str, str],
) -> None:
    """Every prompt alone and streamed, then all of them at once among as many others as make 64."""
    options = ("--stages", str(stages), "--max-num-batched-tokens", str(chunk), *flags)
    with serving(tmp_path, *options, environment=ray_cluster) as server:
        length = {} if stages == 1 else {"max_tokens": FEW}
        alone = ["".join(await stream(client, server, prompt, **length)) for prompt in PROMPTS]
        others = [Prompt(f"{number} boats on the sea", 24, False) for number in range(CLIENTS - len(PROMPTS))]
        crowd = await asyncio.gather(*(complete(client, server, prompt) for prompt in [*PROMPTS, *others]))
    if stages > 1:
        assert all(alone)
        assert alone == [whole[: len(text)] for text, whole in zip(alone, EXPECTED, strict=True)]
    else:
        assert alone == EXPECTED
    assert crowd[: len(PROMPTS)] == EXPECTED


@pytest.mark.slow
async def test_a_split_given_by_hand_gives_the_same_text_also_where_prompts_go_token_by_token(
    tmp_path: Path, client: httpx.AsyncClient, ray_cluster: Mapping[str, str]
) -> None:
    options = ("--layers-per-stage", "1,4,1", "--max-num-batched-tokens", "1")
    with serving(tmp_path, *options, environment=ray_cluster) as server:
        texts = await asyncio.gather(*(complete(client, server, PROMPTS[place]) for place in OF_ALL_LENGTHS))
    assert texts == [EXPECTED[place] for place in OF_ALL_LENGTHS]
