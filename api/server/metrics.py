"""The text of GET /metrics: vLLM's metrics under vLLM's names, and our own of each stage; see docs/metrics.md."""

import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TypeVar

import msgspec
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from api.client.request_metrics import CompletionMetrics, RequestMetrics
from api.messages.engine import DraftCounts, EngineMetrics, StageMetrics
from api.messages.histogram import Histogram
from api.server.access import RequestWatch

ENGINE_PREFIX = "galaxyline_engine"
"""The prefix of the kernel's numbers of an engine's process; those of this process have the usual names."""

ENGINE = ("engine",)
MODEL = ("model_name", "engine")
STAGE = ("engine", "stage", "host")

Labels = tuple[str, ...]
Value = TypeVar("Value")


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """The measurements of one engine and its requests.

    `metrics` is None where the engine does not answer, `pid` where it has no process.
    """

    requests: RequestMetrics
    metrics: EngineMetrics | None
    pid: int | None


class FrontMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """What the front end measures beside each engine's requests, and the engines' caches as vLLM's labels have them."""

    watch: RequestWatch
    completions: CompletionMetrics
    cache_config: Mapping[str, str]


class MetricsText:
    """Makes the text from the measurements of the front end, the engines, and the kernel's of their processes.

    An engine's label is its number, "0" for the first.
    """

    def __init__(self, model_name: str) -> None:
        """`model_name` is a label of vLLM's metrics."""
        self._model_name = model_name

    def families(self, engines: Sequence[Measured], front: FrontMetrics | None = None) -> list[Metric]:
        """The measurements so far, as families of metrics."""
        requests: dict[Labels, RequestMetrics] = {
            (self._model_name, str(number)): engine.requests for number, engine in enumerate(engines)
        }
        answers = {str(number): engine.metrics for number, engine in enumerate(engines) if engine.metrics is not None}
        up: dict[Labels, float] = {(str(number),): str(number) in answers for number in range(len(engines))}
        families = [_gauge("galaxyline:engine_up", "1 where the engine answers, else 0.", up, ENGINE)]
        families += _request_families(requests)
        if front is not None:
            families += _http_families(front.watch)
            # The completions of a prompt may be in several engines: as a whole they are counted with the first.
            families += _completion_families((self._model_name, "0"), front.completions)
            families.append(_cache_config(front.cache_config, len(engines)))
        if answers:
            by_model: dict[Labels, EngineMetrics] = {(self._model_name, engine): one for engine, one in answers.items()}
            families += _scheduler_families(by_model)
            families += _draft_families({labels: one.drafts for labels, one in by_model.items()})
            families += _step_families(answers)
            families += _stage_families([(engine, stage) for engine, one in answers.items() for stage in one.stages])
        return families

    def encode(self, families: Sequence[Metric], engines: Sequence[Measured]) -> bytes:
        """Encodes the families as text, and adds those of the processes.

        That takes milliseconds, most of the time of a scrape: call it on any thread.
        """
        pids = {str(number): engine.pid for number, engine in enumerate(engines) if engine.pid is not None}
        registry = CollectorRegistry()
        registry.register(_Families([*families, *_process_families(pids)]))
        registry.register(ProcessCollector(pid=os.getpid, registry=None))
        return generate_latest(registry)


class _Families(Collector):
    """A collector of families that are already made."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _process_families(pids: Mapping[str, int]) -> Iterable[Metric]:
    """The kernel's numbers of each engine's process, without those that have just ended."""
    families: dict[str, Metric] = {}
    for engine, pid in pids.items():
        collector = ProcessCollector(namespace=ENGINE_PREFIX, pid=functools.partial(int, pid), registry=None)
        for of_one in collector.collect():
            family = families.setdefault(of_one.name, Metric(of_one.name, of_one.documentation, of_one.type))
            for sample in of_one.samples:
                family.add_sample(sample.name, {**sample.labels, "engine": engine}, sample.value)
    return families.values()


def _request_families(requests: Mapping[Labels, RequestMetrics]) -> Iterator[Metric]:
    def each(of: Callable[[RequestMetrics], Value]) -> dict[Labels, Value]:
        return {labels: of(one) for labels, one in requests.items()}

    yield _counter("vllm:prompt_tokens", "Prompt tokens processed.", each(lambda one: one.prompt_tokens), MODEL)
    yield _counter("vllm:generation_tokens", "Tokens generated.", each(lambda one: one.generation_tokens), MODEL)
    yield _counter(
        "vllm:request_success",
        "Requests that ended, by reason.",
        {(*labels, reason): count for labels, one in requests.items() for reason, count in one.finished.items()},
        (*MODEL, "finished_reason"),
    )
    for name, text, histograms in (
        (
            "vllm:time_to_first_token_seconds",
            "From a request to its first token.",
            each(lambda one: one.first_token_times),
        ),
        (
            "vllm:inter_token_latency_seconds",
            "From one token of a request to its next; tokens that come together count as one.",
            each(lambda one: one.inter_token_times),
        ),
        ("vllm:e2e_request_latency_seconds", "From a request to its last token.", each(lambda one: one.latencies)),
        ("vllm:request_prompt_tokens", "Prompt tokens of a request.", each(lambda one: one.prompt_lengths)),
        (
            "vllm:request_generation_tokens",
            "Tokens generated for a request.",
            each(lambda one: one.generation_lengths),
        ),
        ("vllm:request_params_max_tokens", "The max_tokens of a request.", each(lambda one: one.max_tokens)),
        (
            "vllm:request_time_per_output_token_seconds",
            "Mean time from one token of a request to its next.",
            each(lambda one: one.times_per_token),
        ),
    ):
        yield _histogram(name, text, histograms, MODEL)


def _completion_families(labels: Labels, completions: CompletionMetrics) -> Iterator[Metric]:
    yield _histogram("vllm:request_params_n", "The n of a request.", {labels: completions.choices}, MODEL)
    text = "Tokens of the longest of a request's n completions."
    yield _histogram("vllm:request_max_num_generation_tokens", text, {labels: completions.longest}, MODEL)


def _http_families(watch: RequestWatch) -> Iterator[Metric]:
    text = "Requests, by method, handler and status of the answer."
    requests: dict[Labels, float] = dict([*watch.requests.items()])
    yield _counter("http_requests", text, requests, ("method", "handler", "status"))
    text = "From a request's header to the end of its answer."
    durations: dict[Labels, Histogram] = dict([*watch.durations.items()])
    yield _histogram("http_request_duration_seconds", text, durations, ("method", "handler"))


def _cache_config(labels: Mapping[str, str], engines: int) -> Metric:
    values: dict[Labels, float] = {(*labels.values(), str(number)): 1.0 for number in range(engines)}
    return _gauge("vllm:cache_config_info", "1; the KV cache is in the labels.", values, (*labels, "engine"))


def _scheduler_families(engines: Mapping[Labels, EngineMetrics]) -> Iterator[Metric]:
    def each(of: Callable[[EngineMetrics], Value]) -> dict[Labels, Value]:
        return {labels: of(one) for labels, one in engines.items()}

    usage = each(lambda one: 1 - one.counts.free_blocks / one.counts.blocks)
    running, waiting = each(lambda one: one.counts.running), each(lambda one: one.counts.waiting)
    yield _gauge("vllm:num_requests_running", "Requests that have a slot.", running, MODEL)
    yield _gauge("vllm:num_requests_waiting", "Requests that wait for a slot.", waiting, MODEL)
    yield _gauge("vllm:kv_cache_usage_perc", "Share of the KV cache's blocks in use, 0 to 1.", usage, MODEL)
    text = "Requests that had to give way."
    yield _counter("vllm:num_preemptions", text, each(lambda one: one.preemptions), MODEL)
    text = "Requests that ended because their logits were not numbers."
    yield _counter("galaxyline:non_finite_logits", text, each(lambda one: one.non_finite_logits), MODEL)
    text = "Requests that ended because their grammar could not be followed."
    yield _counter("galaxyline:grammar_failures", text, each(lambda one: one.grammar_failures), MODEL)
    text = "Tokens that took logits of the whole vocabulary on the host, as candidates did not decide."
    yield _counter("galaxyline:sampling_fallbacks", text, each(lambda one: one.sampling_fallbacks), MODEL)
    text = "Tokens of requests that got their first slot."
    yield _counter("vllm:prefix_cache_queries", text, each(lambda one: one.prefix.queries), MODEL)
    text = "Tokens of such requests that were cached."
    yield _counter("vllm:prefix_cache_hits", text, each(lambda one: one.prefix.hits), MODEL)
    text = "Tokens computed again after a preemption or the loss of a stage."
    yield _counter("galaxyline:recomputed_tokens", text, each(lambda one: one.prefix.recomputed_tokens), MODEL)
    text = "Blocks on the devices that a request could begin with."
    yield _gauge("galaxyline:prefix_cache_blocks", text, each(lambda one: one.prefix.blocks), MODEL)
    text = "From a request's arrival in the engine to its slot."
    yield _histogram("vllm:request_queue_time_seconds", text, each(lambda one: one.queue_times), MODEL)
    text = "From a request's slot to its first token."
    yield _histogram("vllm:request_prefill_time_seconds", text, each(lambda one: one.prefill_times), MODEL)
    text = "From a request's first token to its last."
    yield _histogram("vllm:request_decode_time_seconds", text, each(lambda one: one.decode_times), MODEL)
    text = "From a request's slot to its last token."
    yield _histogram("vllm:request_inference_time_seconds", text, each(lambda one: one.inference_times), MODEL)
    text = "Tokens of a step, of prompts and generated."
    yield _histogram("vllm:iteration_tokens_total", text, each(lambda one: one.step_tokens), MODEL)


def _draft_families(engines: Mapping[Labels, DraftCounts]) -> Iterator[Metric]:
    """What drafts came to; as in vLLM, nothing where none are asked for."""
    asked = {labels: drafts for labels, drafts in engines.items() if drafts.num_speculative_tokens}
    if not asked:
        return

    def each(of: Callable[[DraftCounts], Value]) -> dict[Labels, Value]:
        return {labels: of(drafts) for labels, drafts in asked.items()}

    text = "Drafts that were verified, each of one request in one step."
    yield _counter("vllm:spec_decode_num_drafts", text, each(lambda drafts: drafts.drafts), MODEL)
    text = "Tokens of such drafts."
    yield _counter("vllm:spec_decode_num_draft_tokens", text, each(lambda drafts: drafts.draft_tokens), MODEL)
    text = "Tokens of such drafts that were right."
    yield _counter("vllm:spec_decode_num_accepted_tokens", text, each(lambda drafts: drafts.accepted_tokens), MODEL)
    positions: dict[Labels, int] = {
        (*labels, str(position)): accepted
        for labels, drafts in asked.items()
        for position, accepted in enumerate(drafts.accepted_per_position)
    }
    text = "Tokens of such drafts that were right, by their place in the draft."
    yield _counter("vllm:spec_decode_num_accepted_tokens_per_pos", text, positions, (*MODEL, "position"))
    text = "1 where requests that begin now get drafts, 0 where these do not pay."
    yield _gauge("galaxyline:drafts_on", text, each(lambda drafts: drafts.are_on), MODEL)


def _step_families(engines: Mapping[str, EngineMetrics]) -> Iterator[Metric]:
    in_flight: dict[Labels, float] = {(engine,): one.counts.steps_in_flight for engine, one in engines.items()}
    yield _gauge("galaxyline:steps_in_flight", "Steps submitted whose result is awaited.", in_flight, ENGINE)
    steps: dict[Labels, Histogram] = {}
    for engine, one in engines.items():
        steps |= {(engine, mode): histogram for mode, histogram in one.steps.items()}
    yield _histogram("galaxyline:step_seconds", "From a step's submission to its result.", steps, (*ENGINE, "mode"))
    text = "From a step's end on the last stage to its result in the engine."
    hops: dict[Labels, Histogram] = {(engine,): one.result_hops for engine, one in engines.items()}
    yield _histogram("galaxyline:result_hop_seconds", text, hops, ENGINE)
    text = "From the loss of a stage until steps could go on."
    recoveries: dict[Labels, Histogram] = {(engine,): one.recoveries for engine, one in engines.items()}
    yield _histogram("galaxyline:recovery_seconds", text, recoveries, ENGINE)


def _stage_families(stages: Sequence[tuple[str, StageMetrics]]) -> Iterator[Metric]:
    def each(of: Callable[[StageMetrics], Value]) -> dict[Labels, Value]:
        return {(engine, str(stage.stage), stage.host): of(stage) for engine, stage in stages}

    busy, share = each(lambda stage: stage.busy_seconds), each(lambda stage: stage.busy_share)
    yield _counter("galaxyline:stage_busy_seconds", "Time spent computing steps.", busy, STAGE)
    yield _gauge("galaxyline:stage_busy_share", "Share of the last 10 s spent computing.", share, STAGE)
    text = "Time spent waiting while the pipeline had a step in flight."
    yield _counter("galaxyline:stage_bubble_seconds", text, each(lambda stage: stage.bubble_seconds), STAGE)
    text = "From the end of steps to their tokens, where these are drawn beside the next step."
    yield _counter("galaxyline:stage_sampling_seconds", text, each(lambda stage: stage.sampling_seconds), STAGE)
    text = "Processor time of the thread that computes steps."
    yield _counter("galaxyline:stage_cpu_seconds", text, each(lambda stage: stage.cpu_seconds), STAGE)
    text = "Processor time of drawing tokens."
    yield _counter("galaxyline:stage_sampling_cpu_seconds", text, each(lambda stage: stage.sampling_cpu_seconds), STAGE)
    steps: dict[Labels, Histogram] = {}
    for engine, stage in stages:
        place = (engine, str(stage.stage), stage.host)
        steps |= {(*place, mode): histogram for mode, histogram in stage.steps.items()}
    yield _histogram("galaxyline:stage_step_seconds", "A step's time on a stage.", steps, (*STAGE, "mode"))
    text = "From the stage before, or the engine, to the stage."
    yield _histogram("galaxyline:stage_hop_seconds", text, each(lambda stage: stage.hops), STAGE)
    text = "From a step's arrival on a stage to its beginning."
    yield _histogram("galaxyline:stage_queue_seconds", text, each(lambda stage: stage.queues), STAGE)
    text = "Bytes of the KV cache kept in the host's memory."
    yield _gauge("galaxyline:stage_host_tier_bytes", text, each(lambda stage: stage.host_tier_bytes), STAGE)
    text = "Bytes of the KV cache kept on the host's disk."
    yield _gauge("galaxyline:stage_disk_tier_bytes", text, each(lambda stage: stage.disk_tier_bytes), STAGE)


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
