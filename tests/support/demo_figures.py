"""Figures of the demo: what an engine measured, and what the tt-metal demo reports."""

from api.messages.engine import Counts, DraftCounts, EngineMetrics, StageMetrics
from api.messages.histogram import Histogram
from stages.step import MODES

TT_METAL_STATISTICS = {
    "preparing_prefill_config",
    "preparing_decode_config",
    "inference_prefill",
    "inference_decode",
    "prefill_time_to_token",
    "prefill_time_to_first_token",
    "prefill_t/s",
    "decode_t/s/u",
    "decode_t/s",
    "trace_execution_t/s/u @128th token",
    "Full demo runtime",
}
"""Keys of the tt-metal demo's statistics."""

MTP_STATISTICS = {"mtp_verifies", "mtp_accepts", "mtp_accept_rate"}
"""The keys that it has with --mtp on alone."""

NO_DRAFTS = DraftCounts()


def metrics(prefill: float, decode: float, *busy: float, drafts: DraftCounts = NO_DRAFTS) -> EngineMetrics:
    empty = Histogram.of((1.0,))
    return EngineMetrics(
        counts=Counts(waiting=0, running=0, steps_in_flight=0, free_slots=1, slots=1, free_blocks=1, blocks=1),
        preemptions=0,
        prefill_seconds=prefill,
        decode_seconds=decode,
        queue_times=empty,
        steps=dict.fromkeys(MODES, empty),
        result_hops=empty,
        recoveries=empty,
        prefill_times=empty,
        decode_times=empty,
        inference_times=empty,
        step_tokens=empty,
        stages=[stage(seconds) for seconds in busy],
        drafts=drafts,
    )


# Statistics


def stage(busy: float) -> StageMetrics:
    empty = Histogram.of((1.0,))
    return StageMetrics(
        stage=0,
        host="h",
        busy_seconds=busy,
        busy_share=0.0,
        bubble_seconds=0.0,
        steps=dict.fromkeys(MODES, empty),
        hops=empty,
        queues=empty,
    )
