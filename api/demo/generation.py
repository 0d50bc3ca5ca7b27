"""Completing many prompts through an engine, with the time of every token and the statistics of a run."""

import asyncio
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from itertools import pairwise
from typing import Protocol, TypeAlias

import msgspec
import numpy as np

from api.client.open_requests import TokenSource
from api.messages.engine import AddRequest, DraftCounts, EngineMetrics


class TextDecoder(Protocol):
    """Turns tokens into text as they come; api.text.tokenizer.IncrementalDecoder is one."""

    def add(self, token: int) -> str | None:
        """Returns the text that a token completes, None while a character is short of bytes."""

    def flush(self) -> str:
        """Returns the text of the tokens held back, as far as it can be read."""


class TokenIds:
    """The text of tokens without a tokenizer: their ids, with spaces between."""

    def add(self, token: int) -> str:
        """Returns the id."""
        return f"{token} "

    def flush(self) -> str:
        """Returns nothing, as no token is held back."""
        return ""


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """The completion of one prompt.

    `tokens` are those sampled, without the one it stopped at; `times` are those of all that were sampled, in seconds
    of one clock, as `submitted` is. Tokens that came together have the same.
    """

    prompt_tokens: int
    tokens: list[int]
    text: str
    submitted: float
    times: list[float]

    def speed_at(self, token: int) -> float | None:
        """The tokens a second when the `token`-th came: those that came with it, over the time since those before.

        None where there are not as many, or nothing came before.
        """
        if len(self.times) < token:
            return None
        came = self.times[token - 1]
        before = bisect_left(self.times, came)
        return (bisect_right(self.times, came) - before) / (came - self.times[before - 1]) if before else None


class GenerationJob(msgspec.Struct, frozen=True, kw_only=True):
    """One request and how its tokens are read; `on_text` gets its text as it comes, and all of it in the end."""

    request: AddRequest
    decoder: TextDecoder
    on_text: Callable[[str], None] | None = None
    on_done: Callable[[Generation], None] | None = None


async def generate(engine: TokenSource, jobs: Sequence[GenerationJob]) -> list[Generation]:
    """Completes all `jobs` at once; returns the completions in their order.

    Raises EngineError if the engine fails, and what `on_done` raises; the others are aborted then.
    """
    tasks = [asyncio.create_task(_complete(engine, job)) for job in jobs]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _complete(engine: TokenSource, job: GenerationJob) -> Generation:
    tokens: list[int] = []
    times: list[float] = []
    text: list[str] = []

    def add_text(new: str) -> None:
        text.append(new)
        if job.on_text is not None and new:
            job.on_text(new)

    submitted = time.monotonic()
    async with aclosing(engine.generate(job.request)) as outputs:
        async for output in outputs:
            now = time.monotonic()
            times += [now] * len(output.tokens)
            for token in output.tokens if output.finish_reason != "stop" else output.tokens[:-1]:
                tokens.append(token)
                add_text(job.decoder.add(token) or "")
    add_text(job.decoder.flush())
    generation = Generation(
        prompt_tokens=len(job.request.tokens), tokens=tokens, text="".join(text), submitted=submitted, times=times
    )
    if job.on_done is not None:
        job.on_done(generation)
    return generation


Statistics: TypeAlias = "dict[str, float | list[float] | None]"

TRACE_TOKEN = 128
"""The token whose speed `trace_execution_t/s/u @128th token` gives."""


def statistics(
    generations: Sequence[Generation], metrics: EngineMetrics, *, seconds_to_ready: float, runtime: float
) -> Statistics:
    """The statistics of a run of all `generations`, in seconds and tokens per second.

    `seconds_to_ready` is how long the stages took to start; the configs of both modes are made then, at once, so that
    `preparing_decode_config` is 0. `metrics` are the engine's at the end of the run. A speed for which nothing was
    measured is None.
    """
    prefill, decode = metrics.prefill_seconds, metrics.decode_seconds
    prompt_tokens = sum(generation.prompt_tokens for generation in generations)
    decoded = sum(max(len(generation.times) - 1, 0) for generation in generations)
    first = [generation.times[0] - generation.submitted for generation in generations if generation.times]
    arrivals = [list(dict.fromkeys(generation.times)) for generation in generations]
    gaps = [later - earlier for times in arrivals for earlier, later in pairwise(times)]
    speeds = [speed for generation in generations if (speed := generation.speed_at(TRACE_TOKEN)) is not None]
    return {
        "preparing_prefill_config": seconds_to_ready,
        "preparing_decode_config": 0.0,
        "inference_prefill": prefill,
        "inference_decode": decode,
        "prefill_time_to_token": prefill / len(generations),
        "prefill_time_to_first_token": prefill / len(generations),
        "prefill_t/s": _rate(prompt_tokens, prefill),
        "decode_t/s/u": _mean([speed for g in generations if (speed := _speed(g)) is not None]),
        "decode_t/s": _rate(decoded, decode),
        f"trace_execution_t/s/u @{TRACE_TOKEN}th token": _mean(speeds),
        "Full demo runtime": runtime,
        "time_to_first_token_p50": _percentile(first, 50),
        "time_to_first_token_p99": _percentile(first, 99),
        "inter_token_latency_p50": _percentile(gaps, 50),
        "inter_token_latency_p99": _percentile(gaps, 99),
        "stage_busy_share": [_rate(stage.busy_seconds, prefill + decode) or 0.0 for stage in metrics.stages],
        **_drafts(metrics.drafts),
    }


def _drafts(drafts: DraftCounts) -> Statistics:
    """What drafts came to, under the tt-metal demo's names; nothing where none were asked for."""
    if not drafts.num_speculative_tokens:
        return {}
    return {
        "mtp_verifies": drafts.draft_tokens,
        "mtp_accepts": drafts.accepted_tokens,
        "mtp_accept_rate": _rate(drafts.accepted_tokens, drafts.draft_tokens),
    }


def lines(measured: Mapping[str, float | list[float] | None]) -> list[str]:
    """The statistics as a person reads them: a line on the units, then one for each."""
    units = "Statistics, in seconds; t/s: tokens per second; t/s/u: tokens per second for each user."
    return [units, *(f"{name}: {_in_words(value)}" for name, value in measured.items())]


def _speed(generation: Generation) -> float | None:
    """Tokens a second of one user, once its first token is there."""
    times = generation.times
    return _rate(len(times) - 1, times[-1] - times[0]) if len(times) > 1 else None


def _rate(count: float, seconds: float) -> float | None:
    return count / seconds if seconds > 0 else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _percentile(values: Sequence[float], percent: float) -> float | None:
    return float(np.percentile(values, percent)) if values else None


def _in_words(value: float | list[float] | None) -> str:
    if value is None:
        return "none"
    return ", ".join(f"{part:.4g}" for part in (value if isinstance(value, list) else [value]))
