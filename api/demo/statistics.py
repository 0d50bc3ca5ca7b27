"""The statistics of a demo, under the tt-metal demo's keys and with their meaning.

Where that demo measured one batch after another, here prompts of all ages share the pipeline. So the run is cut at its
results instead: the time from one result to the next belongs to the step that came back, and `inference_prefill` and
`inference_decode` are the sums over prefill and decode steps.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TypeAlias

import numpy as np

from api.demo.generation import Generation
from api.messages.engine import EngineMetrics

Statistics: TypeAlias = "dict[str, float | list[float] | None]"

TRACE_TOKEN = 128
"""Which token's speed `trace_execution_t/s/u @128th token` tells."""


def statistics(
    generations: Sequence[Generation], metrics: EngineMetrics, *, seconds_to_ready: float, runtime: float
) -> Statistics:
    """What the run of all `generations` came to, in seconds and tokens per second.

    `seconds_to_ready` is how long the stages took to start; both modes' configs are made then, at once, so that
    `preparing_decode_config` is 0. `metrics` are the engine's at the end of the run. A speed that nothing was measured
    for is None.
    """
    prefill, decode = metrics.prefill_seconds, metrics.decode_seconds
    prompt_tokens = sum(generation.prompt_tokens for generation in generations)
    decoded = sum(max(len(generation.times) - 1, 0) for generation in generations)
    first = [generation.times[0] - generation.submitted for generation in generations if generation.times]
    gaps = [later - earlier for generation in generations for earlier, later in pairwise(generation.times)]
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
        f"trace_execution_t/s/u @{TRACE_TOKEN}th token": _mean(
            [
                1 / (g.times[TRACE_TOKEN - 1] - g.times[TRACE_TOKEN - 2])
                for g in generations
                if len(g.times) >= TRACE_TOKEN
            ]
        ),
        "Full demo runtime": runtime,
        "time_to_first_token_p50": _percentile(first, 50),
        "time_to_first_token_p99": _percentile(first, 99),
        "inter_token_latency_p50": _percentile(gaps, 50),
        "inter_token_latency_p99": _percentile(gaps, 99),
        "stage_busy_share": [_rate(stage.busy_seconds, prefill + decode) or 0.0 for stage in metrics.stages],
    }


def lines(measured: Mapping[str, float | list[float] | None]) -> list[str]:
    """The statistics as a person reads them."""
    return [f"{name}: {_in_words(value)}" for name, value in measured.items()]


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
