"""More clients than the cache can hold: all are answered in full, and afterwards nothing is in use."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from api.client.engine_client import EngineClient
from api.server.app import create_app
from api.server.serve import listen, url
from api.settings.engine import EngineSettings
from api.text.model_source import resolve_model
from api.text.served_model import ServedModel
from tests.support.servers import Prompt, sample_prompts
from weights.model_config import ModelConfig

CLIENTS = 64
SLOTS = 21
MAX_MODEL_LEN = 640
START_S = 120.0
ANSWER_S = 240.0
QUIET_S = 20.0


@asynccontextmanager
async def front_end_and_engine(settings: EngineSettings) -> AsyncIterator[tuple[str, EngineClient]]:
    """Runs the front end on this loop, so that its tasks can be counted, before a real engine and pipeline."""
    source = resolve_model(None, {})
    config = ModelConfig.from_file(source.path / "config.json")
    options = settings.engine_options(source, config)
    model = ServedModel.load(source, config, options.pipeline.stage.cache.max_model_len)
    listener = listen("127.0.0.1", 0)
    async with EngineClient.start(options) as engine:
        await engine.wait_ready(START_S)
        app = create_app(model, engine)
        server = uvicorn.Server(uvicorn.Config(app, http="httptools", ws="none", log_config=None))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            async with httpx.AsyncClient(base_url=url(listener)) as client:
                (await client.get("/health")).raise_for_status()
            yield url(listener), engine
        finally:
            server.should_exit = True
            await serving
            listener.close()


async def ask(client: httpx.AsyncClient, prompt: Prompt) -> tuple[str, int]:
    """Returns the text and the number of tokens of an answer."""
    body = {"prompt": prompt.prompt, "max_tokens": prompt.max_tokens, "temperature": 0, "ignore_eos": True}
    answer = (await client.post("/v1/completions", json=body)).raise_for_status().json()
    return answer["choices"][0]["text"], answer["usage"]["completion_tokens"]


async def tasks_left_beside(expected: set["asyncio.Task[Any]"]) -> set["asyncio.Task[Any]"]:
    """Returns the loop's other tasks that do not end; connections end some turns after the last answer."""
    others = asyncio.all_tasks() - expected
    _, left = await asyncio.wait(others, timeout=QUIET_S) if others else (set(), set())
    return left


@pytest.mark.slow
async def test_three_times_what_fits_is_answered_in_full_and_leaves_nothing(
    tmp_path: Path, ray_cluster: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ray_cluster.items():
        monkeypatch.setenv(name, value)
    prompts = sample_prompts()
    asked = [prompts[number % len(prompts)] for number in range(CLIENTS)]
    # A third of the clients fit the slots, and fewer the blocks when all are long: some are preempted.
    blocks = MAX_MODEL_LEN // 32 + SLOTS * 3
    settings = EngineSettings.of(
        cache_dir=tmp_path, stages=2, max_num_seqs=SLOTS, num_blocks=blocks, max_model_len=MAX_MODEL_LEN, spare=False
    )
    async with front_end_and_engine(settings) as (base, engine):
        before = await engine.counts()
        tasks = asyncio.all_tasks()
        async with httpx.AsyncClient(base_url=base, timeout=ANSWER_S) as client:
            answers = await asyncio.gather(*(ask(client, prompt) for prompt in asked))
        after = await engine.counts()
        assert await tasks_left_beside(tasks) == set()
    assert [tokens for _, tokens in answers] == [prompt.max_tokens for prompt in asked]
    texts = dict(zip((prompt.prompt for prompt in asked), (text for text, _ in answers), strict=True))
    assert [text for text, _ in answers] == [texts[prompt.prompt] for prompt in asked]
    assert after == before
    assert (after.waiting, after.running, after.steps_in_flight) == (0, 0, 0)
    assert (after.free_slots, after.free_blocks) == (SLOTS, blocks)
