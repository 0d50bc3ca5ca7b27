"""The arithmetic of busy time, bubbles, hops and queues, against plain counting of nanoseconds."""

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client import Histogram as PrometheusHistogram

from actors.errors import ProtocolError
from api.engine.meters import NS, NS_PER_S, RECENT_SECONDS, BusyWindow, EngineMeters, StepRecord
from api.messages.engine import Counts, DraftCounts, EngineMetrics, FinishReason, PrefixCounts, RequestOutput
from api.messages.histogram import Histogram, one_two_five
from api.messages.pipeline_view import TierBytes
from api.scheduler.sequence import Tallies
from stages.step import Mode, StageTiming, StepResult
from tests.support.step_flows import EPOCH, Flow, flows, step_of

DRAFTS = DraftCounts(num_speculative_tokens=2, drafts=5, draft_tokens=10, accepted_tokens=7)
NO_COUNTS = Counts(waiting=0, running=0, steps_in_flight=0, free_slots=1, slots=1, free_blocks=1, blocks=1)


def measured(meters: EngineMeters) -> EngineMetrics:
    hosts = [f"host-{stage}" for stage in range(len(meters.stages))]
    tiers = [TierBytes(stage, 2 * stage) for stage in range(len(meters.stages))]
    return meters.metrics(NO_COUNTS, Tallies(), PrefixCounts(), DRAFTS, hosts, tiers)


def run(flow: Flow, meters: EngineMeters, until: float = math.inf) -> int:
    """Reports what happens before `until` to the meters; returns the number of steps in flight then."""
    in_flight = 0
    for time_ns, place, returns in flow.events:
        if time_ns >= until:
            break
        record, result, _ = flow.transfers[place]
        if not returns:
            if not in_flight:
                meters.pipeline_fills(time_ns)
            in_flight += 1
            continue
        meters.step_done(record, result, time_ns)
        in_flight -= 1
        if not in_flight:
            meters.pipeline_empties(time_ns)
    return in_flight


@given(flows())
def test_bubbles_are_the_time_with_a_step_in_flight_and_none_on_the_stage(flow: Flow) -> None:
    meters = EngineMeters(flow.stages)
    assert run(flow, meters) == 0
    in_flight = {ns for record, _, returned_ns in flow.transfers for ns in range(record.submitted_ns, returned_ns)}
    for stage, meter in enumerate(meters.stages):
        spans = [result.timings[stage] for _, result, _ in flow.transfers]
        busy = {ns for timing in spans for ns in range(timing.began_ns, timing.ended_ns)}
        assert meter.busy_ns == len(busy)
        assert meter.bubble_ns == len(in_flight - busy)
        assert meter.busy_ns + meter.bubble_ns == len(in_flight)


@given(flows(), st.integers(0, 1000))
def test_bubbles_grow_and_never_exceed_what_has_passed(flow: Flow, until: int) -> None:
    """A counter must not fall, so a wait is counted when the step after it is back."""
    early, late = EngineMeters(flow.stages), EngineMeters(flow.stages)
    run(flow, early, until=100 + until)
    run(flow, late)
    for stage, meter in enumerate(early.stages):
        in_flight = {
            ns
            for record, _, returned_ns in flow.transfers
            for ns in range(record.submitted_ns, min(returned_ns, 100 + until))
        }
        assert 0 <= meter.bubble_ns <= late.stages[stage].bubble_ns
        assert meter.bubble_ns + meter.busy_ns <= len(in_flight)


@given(flows())
def test_hops_queues_and_steps_add_up(flow: Flow) -> None:
    meters = EngineMeters(flow.stages)
    run(flow, meters)
    metrics = measured(meters)
    count = len(flow.transfers)
    whole = sum(returned_ns - record.submitted_ns for record, _, returned_ns in flow.transfers)
    parts = 0.0
    for stage in metrics.stages:
        assert sum(stage.hops.counts) == sum(stage.queues.counts) == count
        steps = (stage.steps["prefill"], stage.steps["decode"])
        assert sum(sum(histogram.counts) for histogram in steps) == count
        assert stage.steps["prefill"].total + stage.steps["decode"].total == pytest.approx(stage.busy_seconds)
        parts += stage.hops.total + stage.queues.total + stage.busy_seconds + stage.sampling_seconds
        assert 0 <= stage.cpu_seconds <= stage.busy_seconds + NS
        assert 0 <= stage.sampling_cpu_seconds <= stage.sampling_seconds + NS
    assert parts + metrics.result_hops.total == pytest.approx(whole * NS)
    assert metrics.steps["prefill"].total + metrics.steps["decode"].total == pytest.approx(whole * NS)
    assert metrics.sampling_fallbacks == sum(result.fallbacks for _, result, _ in flow.transfers)
    prefills = sum(record.step.mode == "prefill" for record, _, _ in flow.transfers)
    assert sum(metrics.steps["prefill"].counts) == prefills
    assert sum(metrics.stages[0].steps["prefill"].counts) == prefills


def test_what_stages_keep_beside_their_devices_goes_with_their_times() -> None:
    stages = measured(EngineMeters(3)).stages
    assert [(stage.host, stage.host_tier_bytes, stage.disk_tier_bytes) for stage in stages] == [
        ("host-0", 0, 0),
        ("host-1", 1, 2),
        ("host-2", 2, 4),
    ]


def shifted(timing: StageTiming, by_ns: int) -> StageTiming:
    """The times of a stage whose clock is so far ahead."""
    return msgspec.structs.replace(
        timing,
        received_ns=timing.received_ns + by_ns,
        began_ns=timing.began_ns + by_ns,
        ended_ns=timing.ended_ns + by_ns,
        sampled_ns=timing.sampled_ns and timing.sampled_ns + by_ns,
    )


@given(flows(), st.lists(st.integers(-1000, 1000), min_size=4, max_size=4))
def test_clocks_that_differ_between_hosts_make_no_time_negative(flow: Flow, ahead_ns: list[int]) -> None:
    transfers = [
        (record, msgspec.structs.replace(result, timings=list(map(shifted, result.timings, ahead_ns))), returned_ns)
        for record, result, returned_ns in flow.transfers
    ]
    meters = EngineMeters(flow.stages)
    run(Flow(flow.stages, transfers), meters)
    metrics = measured(meters)
    for stage in metrics.stages:
        assert min(stage.hops.total, stage.queues.total, stage.busy_seconds, stage.bubble_seconds) >= 0
    assert metrics.result_hops.total >= 0


def test_a_result_without_the_times_of_every_stage_is_refused() -> None:
    record = StepRecord(step_of(7, "decode", 1), 100, [])
    result = StepResult(epoch=EPOCH, step_id=7, tokens=[], timings=[StageTiming(received_ns=1, began_ns=2, ended_ns=3)])
    with pytest.raises(ProtocolError, match="Step 7 came back with the times of 1 stages; there are 2"):
        EngineMeters(2).step_done(record, result, 200)


def test_a_request_waits_from_its_arrival_to_its_first_slot() -> None:
    meters = EngineMeters(1)
    for request_id in range(3):
        meters.request_waits(request_id, request_id * NS_PER_S)
    meters.request_runs(0, 4 * NS_PER_S)
    meters.request_leaves(1)
    meters.request_runs(2, 5 * NS_PER_S)
    meters.request_runs(0, 9 * NS_PER_S)  # Again, after it had to give way.
    meters.request_leaves(0)
    waits = measured(meters).queue_times
    assert sum(waits.counts) == 2
    assert waits.total == pytest.approx(4.0 + 3.0)


TENTH = NS_PER_S // 10


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 60)), max_size=30), st.integers(0, 200))
def test_the_recent_share_is_that_of_the_last_ten_seconds(waits_and_steps: list[tuple[int, int]], idle: int) -> None:
    window = BusyWindow()
    busy: set[int] = set()
    now = 1000
    for wait, step in waits_and_steps:
        began = now + wait
        now = began + step
        window.add_step(began * TENTH, now * TENTH)
        busy |= set(range(began, now))
    now += idle
    first = now // 10 * 10 - 10 * RECENT_SECONDS
    expected = len(busy & set(range(first, now))) / (now - first)
    assert window.share(now * TENTH) == pytest.approx(expected)


@given(st.lists(st.floats(0, 200) | st.sampled_from([0.5, 1.0, 2.5, 100.0]), max_size=40))
def test_a_histogram_counts_as_prometheus_own(values: list[float]) -> None:
    bounds = [0.5, 1.0, 2.5, 100.0]
    registry = CollectorRegistry()
    theirs = PrometheusHistogram("x", "", buckets=bounds, registry=registry)
    ours = Histogram.of(bounds)
    for value in values:
        theirs.observe(value)
        ours.observe(value)
    so_far = 0
    for bound, count in zip(["0.5", "1.0", "2.5", "100.0", "+Inf"], ours.counts, strict=True):
        so_far += count
        assert registry.get_sample_value("x_bucket", {"le": bound}) == so_far
    assert registry.get_sample_value("x_sum") == ours.total


def test_bounds_of_token_counts_are_vllms() -> None:
    assert one_two_five(100) == [1, 2, 5, 10, 20, 50, 100]
    assert one_two_five(256) == [1, 2, 5, 10, 20, 50, 100, 200]
    assert one_two_five(1) == [1]


def output(request_id: int, tokens: int, finish: FinishReason | None = None) -> RequestOutput:
    return RequestOutput(request_id=request_id, tokens=[5] * tokens, finish_reason=finish, error=None)


def test_a_request_prefills_from_its_first_slot_to_its_first_token_and_decodes_to_its_last() -> None:
    meters = EngineMeters(1)
    for request_id in range(4):
        meters.request_waits(request_id, 0)
        meters.request_runs(request_id, 1 * NS_PER_S)
    meters.outputs_came([output(0, 1), output(1, 1), output(2, 0)], 3 * NS_PER_S)
    meters.outputs_came([output(0, 3), output(2, 0, "length")], 7 * NS_PER_S)
    meters.outputs_came([output(0, 1, "stop"), output(9, 1)], 8 * NS_PER_S)
    meters.request_leaves(1)  # Aborted after a token,
    meters.request_leaves(3)  # and before one.
    metrics = measured(meters)
    # Request 2 scores a prompt, and ends as its last chunk comes.
    for histogram, seconds in (
        (metrics.prefill_times, 2 + 2 + 6),
        (metrics.decode_times, 5 + 0 + 0),
        (metrics.inference_times, 7 + 2 + 6),
    ):
        assert sum(histogram.counts) == 3
        assert histogram.total == pytest.approx(seconds)


def test_a_steps_tokens_are_those_of_prompts_or_those_that_came_without_rejected_drafts() -> None:
    meters = EngineMeters(1)
    timing = StageTiming(received_ns=1, began_ns=2, ended_ns=3)
    steps: list[tuple[Mode, int, int]] = [("prefill", 40, 1), ("decode", 8, 8), ("decode", 24, 11), ("load", 0, 0)]
    for step_id, (mode, tokens, came) in enumerate(steps):
        step = step_of(step_id, mode, tokens)
        result = StepResult(epoch=EPOCH, step_id=step_id, tokens=[5] * came, timings=[timing])
        meters.step_done(StepRecord(step, 0, []), result, 10 * (step_id + 1))
    counted = measured(meters).step_tokens
    assert (sum(counted.counts), counted.total) == (3, 40 + 8 + 11)


def test_what_drafts_came_to_goes_with_the_times() -> None:
    assert measured(EngineMeters(1)).drafts == DRAFTS
