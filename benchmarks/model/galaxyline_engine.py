"""This program's engine and pipeline as a contender, used through `EngineClient`: all but HTTP and text."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from api.client.engine_client import EngineClient
from api.messages.engine import AddRequest
from api.settings.engine import EngineSettings
from api.text.model_source import ModelSource
from benchmarks.model.contender import ANSWER_SECONDS, TokenTimes
from stages.step import SamplingParams
from weights.model_config import ModelConfig

START_SECONDS = 300.0

GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, seed=0, choice=0)


class GalaxylineEngine:
    """A `Contender` that is this program."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client

    async def complete(self, prompts: Sequence[list[int]], new_tokens: int) -> TokenTimes:
        """See `Contender`."""
        began = time.perf_counter()
        completing = asyncio.gather(*(self._complete(prompt, new_tokens, began) for prompt in prompts))
        return TokenTimes(await asyncio.wait_for(completing, ANSWER_SECONDS))

    async def _complete(self, prompt: list[int], new_tokens: int, began: float) -> list[float]:
        request = AddRequest(
            request_id=self._client.next_request_id(),
            tokens=prompt,
            max_tokens=new_tokens,
            stop_token_ids=[],
            sampling=GREEDY,
        )
        times: list[float] = []
        async with contextlib.aclosing(self._client.generate(request)) as outputs:
            async for output in outputs:
                times += [time.perf_counter() - began] * len(output.tokens)
        return times


@contextlib.asynccontextmanager
async def galaxyline_engine(model: Path, settings: EngineSettings) -> AsyncIterator[GalaxylineEngine]:
    """Starts the engine with these settings and waits until it is ready."""
    source = ModelSource(path=model, name=model.name, root=str(model))
    options = settings.engine_options(source, ModelConfig.from_file(model / "config.json"))
    async with EngineClient.start(options) as client:
        await client.wait_ready(START_SECONDS)
        yield GalaxylineEngine(client)
