"""The text that Prometheus reads: vLLM's metrics under vLLM's names, and our own of each stage; see docs/metrics.md."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TypeVar

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from api.histogram import Histogram
from api.messages import EngineMetrics, StageMetrics
from api.request_metrics import RequestMetrics

ENGINE_PREFIX = "galaxyline_engine"
"""Begins the names of the kernel's numbers of the engine's process; those of this process have the usual names."""

MODEL = ("model_name",)
STAGE = ("stage", "host")

Labels = tuple[str, ...]
Value = TypeVar("Value")


class MetricsText:
    """Puts together what the front end and the engine have measured, and what the kernel says of both processes."""

    def __init__(self, model_name: str, engine_pid: Callable[[], int]) -> None:
        """`model_name` is the label of vLLM's metrics."""
        self._model_name = model_name
        self._processes = [
            ProcessCollector(pid=os.getpid, registry=None),
            ProcessCollector(namespace=ENGINE_PREFIX, pid=engine_pid, registry=None),
        ]

    def families(self, requests: RequestMetrics, engine: EngineMetrics | None) -> list[Metric]:
        """What has been measured so far; `engine` is None where it did not answer."""
        up = _gauge("galaxyline:engine_up", "1 where the engine answers, else 0.", {(): engine is not None})
        families = [up, *_request_families((self._model_name,), requests)]
        if engine is not None:
            families += _scheduler_families((self._model_name,), engine)
            families += _step_families(engine)
            families += _stage_families(engine.stages)
        return families

    def encode(self, families: Sequence[Metric]) -> bytes:
        """The text, processes included.

        It takes milliseconds, most of the time that a scrape does: call it from any thread.
        """
        registry = CollectorRegistry()
        registry.register(_Families(families))
        for process in self._processes:
            registry.register(process)
        return generate_latest(registry)


class _Families(Collector):
    """Families that are made already."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _request_families(model: Labels, requests: RequestMetrics) -> Iterator[Metric]:
    yield _counter("vllm:prompt_tokens", "Prompt tokens processed.", {model: requests.prompt_tokens}, MODEL)
    yield _counter("vllm:generation_tokens", "Tokens generated.", {model: requests.generation_tokens}, MODEL)
    yield _counter(
        "vllm:request_success",
        "Requests that ended, by reason.",
        {(*model, reason): count for reason, count in requests.finished.items()},
        (*MODEL, "finished_reason"),
    )
    for name, text, histogram in (
        ("vllm:time_to_first_token_seconds", "From a request to its first token.", requests.first_token_times),
        ("vllm:inter_token_latency_seconds", "From one token of a request to its next.", requests.inter_token_times),
        ("vllm:e2e_request_latency_seconds", "From a request to its last token.", requests.latencies),
        ("vllm:request_prompt_tokens", "Prompt tokens of a request.", requests.prompt_lengths),
        ("vllm:request_generation_tokens", "Tokens generated for a request.", requests.generation_lengths),
    ):
        yield _histogram(name, text, {model: histogram}, MODEL)


def _scheduler_families(model: Labels, engine: EngineMetrics) -> Iterator[Metric]:
    counts = engine.counts
    usage = 1 - counts.free_blocks / counts.blocks
    yield _gauge("vllm:num_requests_running", "Requests that have a slot.", {model: counts.running}, MODEL)
    yield _gauge("vllm:num_requests_waiting", "Requests that wait for a slot.", {model: counts.waiting}, MODEL)
    yield _gauge("vllm:kv_cache_usage_perc", "Share of the KV cache's blocks in use, 0 to 1.", {model: usage}, MODEL)
    yield _counter("vllm:num_preemptions", "Requests that had to give way.", {model: engine.preemptions}, MODEL)
    yield _counter("vllm:prefix_cache_queries", "0: there is no prefix cache.", {model: 0}, MODEL)
    yield _counter("vllm:prefix_cache_hits", "0: there is no prefix cache.", {model: 0}, MODEL)
    text = "From a request's arrival in the engine to its slot."
    yield _histogram("vllm:request_queue_time_seconds", text, {model: engine.queue_times}, MODEL)


def _step_families(engine: EngineMetrics) -> Iterator[Metric]:
    steps: dict[Labels, Histogram] = {("prefill",): engine.prefill_steps, ("decode",): engine.decode_steps}
    in_flight = engine.counts.steps_in_flight
    yield _gauge("galaxyline:steps_in_flight", "Steps submitted whose result is awaited.", {(): in_flight})
    yield _histogram("galaxyline:step_seconds", "From a step's submission to its result.", steps, ("mode",))
    text = "From a step's end on the last stage to its result in the engine."
    yield _histogram("galaxyline:result_hop_seconds", text, {(): engine.result_hops})


def _stage_families(stages: Sequence[StageMetrics]) -> Iterator[Metric]:
    labels = [(str(stage.stage), stage.host) for stage in stages]
    busy = [stage.busy_seconds for stage in stages]
    share = [stage.busy_share for stage in stages]
    bubble = [stage.bubble_seconds for stage in stages]
    yield _counter("galaxyline:stage_busy_seconds", "Time spent computing steps.", _by(labels, busy), STAGE)
    yield _gauge("galaxyline:stage_busy_share", "Share of the last 10 s spent computing.", _by(labels, share), STAGE)
    text = "Time spent waiting while the pipeline had a step in flight."
    yield _counter("galaxyline:stage_bubble_seconds", text, _by(labels, bubble), STAGE)
    steps: dict[Labels, Histogram] = {}
    for place, stage in zip(labels, stages, strict=True):
        steps |= {(*place, "prefill"): stage.prefill_steps, (*place, "decode"): stage.decode_steps}
    yield _histogram("galaxyline:stage_step_seconds", "A step's time on a stage.", steps, (*STAGE, "mode"))
    text = "From the stage before, or the engine, to the stage."
    yield _histogram("galaxyline:stage_hop_seconds", text, _by(labels, [stage.hops for stage in stages]), STAGE)
    text = "From a step's arrival on a stage to its beginning."
    yield _histogram("galaxyline:stage_queue_seconds", text, _by(labels, [stage.queues for stage in stages]), STAGE)


def _by(labels: Sequence[Labels], values: Sequence[Value]) -> dict[Labels, Value]:
    return dict(zip(labels, values, strict=True))


def _counter(name: str, text: str, values: Mapping[Labels, float], labels: Labels = ()) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for label_values, value in values.items():
        family.add_metric(label_values, value)
    return family


def _gauge(name: str, text: str, values: Mapping[Labels, float], labels: Labels = ()) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for label_values, value in values.items():
        family.add_metric(label_values, value)
    return family


def _histogram(name: str, text: str, values: Mapping[Labels, Histogram], labels: Labels = ()) -> Metric:
    family = HistogramMetricFamily(name, text, labels=labels)
    for label_values, histogram in values.items():
        bounds: list[str] = [floatToGoString(b) for b in (*histogram.bounds, math.inf)]  # type: ignore[no-untyped-call]
        family.add_metric(label_values, list(zip(bounds, accumulate(histogram.counts), strict=True)), histogram.total)
    return family
