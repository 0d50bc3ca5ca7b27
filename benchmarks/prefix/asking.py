"""Requests by token ids to a server with OpenAI's routes, and the times of their tokens."""

import random
import time
from collections.abc import Callable

import httpx
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.support.server_process import ServerError

ANSWER_SECONDS = 600.0

EVENT = "data: "
DONE = "[DONE]"

FIRST_ID, END_ID = 300, 1000
"""The range of the ids of made-up prompts: ordinary tokens in the sample model's vocabulary as in others."""


class _Choice(msgspec.Struct):
    token_ids: list[int] | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []


class Answer(msgspec.Struct, frozen=True):
    """The tokens of an answer, and the seconds from the request to its first one."""

    first_s: float
    tokens: list[int]


class Counters(msgspec.Struct, frozen=True, kw_only=True):
    """Prompt tokens that a server looked up in its prefix cache, those it found, and those it computed again."""

    queries: float
    hits: float
    recomputed: float

    def since(self, before: "Counters") -> "Counters":
        """What was counted meanwhile."""
        return Counters(
            queries=self.queries - before.queries,
            hits=self.hits - before.hits,
            recomputed=self.recomputed - before.recomputed,
        )

    @property
    def hit_rate(self) -> float:
        """The share of prompt tokens that were found."""
        return self.hits / self.queries if self.queries else 0.0


class Asker:
    """A client of one server. It is used as an asynchronous context manager."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._client = httpx.AsyncClient(
            base_url=url, timeout=ANSWER_SECONDS, limits=httpx.Limits(max_connections=None)
        )
        self._model = ""

    async def __aenter__(self) -> "Asker":
        models = (await self._client.get("/v1/models")).json()["data"]
        self._model = models[0]["id"]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def ask(self, prompt: list[int], tokens: int, on_token: Callable[[], None] = lambda: None) -> Answer:
        """Streams an answer of so many tokens; `on_token` is called when some have come. Raises ServerError."""
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        began = time.monotonic()
        first_s = 0.0
        answered: list[int] = []
        async with self._client.stream("POST", "/v1/completions", json=body) as response:
            if not response.is_success:
                text = (await response.aread()).decode(errors="replace")
                raise ServerError(f"{self._url} answered {response.status_code}: {text[:200]}")
            async for line in response.aiter_lines():
                if line.startswith(EVENT) and DONE not in line:
                    event = msgspec.json.decode(line.removeprefix(EVENT), type=_Event)
                    come = [token for choice in event.choices for token in choice.token_ids or []]
                    answered += come
                    if come:
                        first_s = first_s or time.monotonic() - began
                        on_token()
        if len(answered) != tokens:
            raise ServerError(f"{self._url} gave {len(answered)} tokens where {tokens} were asked for.")
        return Answer(first_s, answered)

    async def counters(self) -> Counters:
        """The server's counters, by the names that vLLM's have too."""
        text = (await self._client.get("/metrics")).text
        sums: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
        return Counters(
            queries=sums.get("vllm:prefix_cache_queries_total", 0.0),
            hits=sums.get("vllm:prefix_cache_hits_total", 0.0),
            recomputed=sums.get("galaxyline:recomputed_tokens_total", 0.0),
        )


def made_up(seed: str, tokens: int) -> list[int]:
    """A prompt of so many tokens that no other seed has."""
    source = random.Random(seed)
    return [source.randrange(FIRST_ID, END_ID) for _ in range(tokens)]
