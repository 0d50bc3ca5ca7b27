"""The measured length of prefill steps, against machines whose speed is known."""

from hypothesis import given
from hypothesis import strategies as st

from api.scheduler.options import ScheduleOptions, SchedulerOptions
from api.scheduler.prefill_budget import PrefillBudget
from stages.options import CacheOptions
from stages.step import StageTiming

BLOCK = 32
CHUNK_MAX = 2048


def budget(wait: float) -> PrefillBudget:
    cache = CacheOptions(slots=2, pools=1, blocks=64, block_size=BLOCK, max_model_len=64)
    return PrefillBudget(
        SchedulerOptions(
            stages=1, cache=cache, prefill_chunk=CHUNK_MAX, schedule=ScheduleOptions(microbatches=1, prefill_wait=wait)
        )
    )


def took(*durations_ns: float) -> list[StageTiming]:
    return [StageTiming(received_ns=0, began_ns=10, ended_ns=10 + int(duration)) for duration in durations_ns]


def test_the_largest_chunk_is_allowed_until_both_kinds_of_step_are_measured() -> None:
    measured = budget(4.0)
    assert measured.tokens == CHUNK_MAX
    measured.record_step("prefill", 100, took(1e6))
    assert measured.tokens == CHUNK_MAX
    measured.record_step("decode", 1, took(1e5))
    assert measured.tokens == BLOCK


def test_the_slowest_stage_counts_and_steps_without_times_do_not() -> None:
    measured = budget(1.0)
    measured.record_step("prefill", 100, took(1e6, 100e6, 2e6))
    measured.record_step("decode", 1, took(5e6, 320e6))
    assert measured.tokens == 320
    measured.record_step("decode", 1, [])
    measured.record_step("prefill", 64, took(0))
    assert measured.tokens == 320


@given(
    wait=st.floats(0.5, 20),
    decode=st.floats(1e6, 1e8),
    token=st.floats(1e4, 1e6),
    overhead=st.floats(0, 1e6),
    slow_at=st.integers(0, 20),
)
def test_chunks_come_to_take_as_long_as_allowed_and_no_longer(
    wait: float, decode: float, token: float, overhead: float, slow_at: int
) -> None:
    """A prefill step of n tokens takes overhead + n * token, a decode step `decode`; one step was ten times as slow."""
    measured = budget(wait)
    for at in range(200):
        tokens = measured.tokens
        assert tokens % BLOCK == 0
        assert BLOCK <= tokens <= CHUNK_MAX
        slow = 10 if at == slow_at else 1
        measured.record_step("prefill", tokens, took(slow * (overhead + tokens * token)))
        measured.record_step("decode", 8, took(decode))
    tokens = measured.tokens
    allowed = wait * decode + 1e3  # Times are whole nanoseconds.
    assert tokens == BLOCK or overhead + tokens * token <= allowed * (1 + 1e-6) + token
    # It is not much shorter either: with two blocks more, at the present time a token, it would take too long.
    longer = (tokens + 2 * BLOCK) / tokens
    assert tokens == CHUNK_MAX or (overhead + tokens * token) * longer >= wait * decode
