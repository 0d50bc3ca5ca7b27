"""The measured length of prefill steps, against machines whose speed is known."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.scheduler.options import ScheduleOptions, SchedulerOptions
from api.scheduler.prefill_budget import (
    FILL,
    SECONDS_MAX,
    STALL_SECONDS,
    UNMEASURED_TOKENS,
    PrefillBudget,
    StepBudget,
    pairs,
)
from stages.options import CacheOptions
from stages.step import StageTiming

BLOCK = 32
CHUNK_MAX = 2048
ALL = 1 << 20
"""The tokens of a prompt that no step can hold."""


def budget(wait: float = 4.0, stages: int = 1) -> PrefillBudget:
    cache = CacheOptions(slots=2, pools=1, blocks=64, block_size=BLOCK, max_model_len=64)
    return PrefillBudget(
        SchedulerOptions(
            stages=stages,
            cache=cache,
            prefill_chunk=CHUNK_MAX,
            schedule=ScheduleOptions(microbatches=1, prefill_wait=wait),
        )
    )


def took(*durations_ns: float) -> list[StageTiming]:
    return [StageTiming(received_ns=0, began_ns=10, ended_ns=10 + int(duration)) for duration in durations_ns]


def step(measured: PrefillBudget, decoding: int = 0, waiting: int = 1, tokens: int = ALL) -> StepBudget:
    return measured.begin_step(decoding, waiting, lambda: tokens)


def chunk(measured: PrefillBudget, decoding: int = 0, waiting: int = 1, tokens: int = ALL, start: int = 0) -> int:
    return step(measured, decoding, waiting, tokens).take(start, ALL)


def measure(measured: PrefillBudget, by_token: float, by_pair: float = 0.0, starts: Sequence[int] = (0,)) -> None:
    for start in starts:
        tokens = 256
        measured.record_step(
            "prefill", tokens, pairs(start, tokens), took(by_token * tokens + by_pair * pairs(start, tokens))
        )


def test_steps_are_short_until_they_are_measured() -> None:
    measured = budget()
    assert chunk(measured) == chunk(measured, decoding=3) == UNMEASURED_TOKENS
    measure(measured, 1e5)
    assert chunk(measured, decoding=3) == UNMEASURED_TOKENS
    assert chunk(measured) == CHUNK_MAX
    measured.record_step("decode", 1, 0.0, took(1e6))
    assert chunk(measured, decoding=1) == BLOCK


def test_the_slowest_stage_counts_and_steps_without_times_do_not() -> None:
    measured = budget(1.0)
    measured.record_step("prefill", 100, pairs(0, 100), took(1e6, 100e6, 2e6))
    measured.record_step("decode", 1, 0.0, took(5e6, 320e6))
    assert chunk(measured, decoding=1) == 320
    measured.record_step("decode", 1, 0.0, [])
    measured.record_step("prefill", 64, pairs(0, 64), took(0))
    assert chunk(measured, decoding=1) == 320


def test_the_more_wait_for_those_that_decode_the_longer_is_a_step() -> None:
    measured = budget(4.0)
    measure(measured, 1e6)
    measured.record_step("decode", 1, 0.0, took(40e6))
    assert [chunk(measured, decoding=4, waiting=waiting) for waiting in (1, 4, 8, 16)] == [160, 160, 320, 640]
    assert chunk(measured, decoding=4, waiting=1000) == int(STALL_SECONDS * 1e3) // BLOCK * BLOCK
    # Decode steps of a second make the bound themselves.
    for _ in range(50):
        measured.record_step("decode", 1, 0.0, took(1e9))
    assert chunk(measured, decoding=4, waiting=1000) == CHUNK_MAX


def test_a_request_that_comes_too_late_for_a_step_waits_for_a_bounded_time() -> None:
    measured = budget()
    measure(measured, 10e6)
    assert chunk(measured) == int(SECONDS_MAX * 100) // BLOCK * BLOCK


def test_a_burst_is_shared_by_the_stages() -> None:
    measured = budget(stages=5)
    measure(measured, 1e5)
    burst = UNMEASURED_TOKENS * FILL * 4 * 2
    left = burst
    while left > 0:
        taken = chunk(measured, tokens=left)
        assert taken == 2 * UNMEASURED_TOKENS
        left -= taken
    # The next one is divided anew.
    assert chunk(measured, tokens=burst // 8) == UNMEASURED_TOKENS
    assert chunk(measured, tokens=ALL) == CHUNK_MAX


def test_chunks_become_shorter_with_the_context_so_that_each_takes_as_long() -> None:
    by_token, by_pair = 1e5, 100.0
    measured = budget(stages=2)
    measure(measured, by_token, by_pair, [0, 512, 1024, 2048, 8192])
    start, chunks = 0, []
    while start < 16384:
        chunks.append((start, chunk(measured, tokens=16384 - start, start=start)))
        start += chunks[-1][1]
    assert chunks[0][1] == 2048
    times = [by_token * tokens + by_pair * pairs(begin, tokens) for begin, tokens in chunks]
    longest = max(times)
    # Up to the block by which each is rounded down, but for the first, which may have no more than is allowed.
    for (begin, tokens), time in zip(chunks[:-1], times, strict=False):
        assert time > 0.999 * longest - (by_token + by_pair * (begin + tokens)) * BLOCK
    lengths = [tokens for _, tokens in chunks]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] < 500


def test_a_prompt_that_ends_leaves_its_time_to_the_next() -> None:
    measured = budget(1.0)
    measure(measured, 1e6)
    measured.record_step("decode", 1, 0.0, took(100e6))
    held = step(measured, decoding=1)
    assert held.tokens == 100
    assert held.take(0, 40) == 40
    assert held.tokens == 60
    assert held.take(0, 500) == BLOCK
    # What is left is less than a block.
    assert held.take(0, 500) == 0
    assert (held.taken, held.pairs) == (72, pairs(0, 40) + pairs(0, 32))


def test_the_first_chunk_has_a_block_however_long_that_takes() -> None:
    measured = budget(1.0)
    measure(measured, 1e6)
    measured.record_step("decode", 1, 0.0, took(1e6))
    held = step(measured, decoding=1)
    assert held.take(1000, 500) == BLOCK
    assert held.tokens == 0


@given(
    wait=st.floats(0.5, 20),
    decode=st.floats(1e6, 1e8),
    by_token=st.floats(1e4, 1e6),
    by_pair=st.floats(0, 100),
    overhead=st.floats(0, 1e6),
    slow_at=st.integers(0, 20),
)
def test_chunks_come_to_take_as_long_as_allowed_and_no_longer(
    wait: float, decode: float, by_token: float, by_pair: float, overhead: float, slow_at: int
) -> None:
    """A prefill step takes overhead, so much a token and a pair, a decode step `decode`; one step was much slower."""
    measured = budget(wait)
    measured.record_step("decode", 1, 0.0, took(decode))

    def time(tokens: int) -> float:
        return overhead + by_token * tokens + by_pair * pairs(0, tokens)

    for at in range(200):
        tokens = chunk(measured, decoding=1)
        assert tokens % BLOCK == 0
        assert BLOCK <= tokens <= CHUNK_MAX
        slow = 10 if at == slow_at else 1
        measured.record_step("prefill", tokens, pairs(0, tokens), took(slow * time(tokens)))
        measured.record_step("decode", 8, 0.0, took(decode))
    allowed = wait * decode + 1e3  # Times are whole nanoseconds.
    # Chunks of one length do not tell tokens from pairs, so a block may be too many.
    assert tokens == BLOCK or time(tokens - (BLOCK if by_pair else 0)) <= allowed * (1 + 1e-6) + by_token
    # It is not much shorter either: with two blocks more, at the present time a token, it would take too long.
    longer = (tokens + 2 * BLOCK) / tokens
    assert tokens == CHUNK_MAX or time(tokens) * longer * longer >= wait * decode


@pytest.mark.parametrize("by_pair", [0.0, 7.0, 300.0])
def test_what_tokens_and_their_context_take_is_told_apart(by_pair: float) -> None:
    measured = budget(1.0)
    measure(measured, 2e5, by_pair, [0, 256, 512, 4096])
    measured.record_step("decode", 1, 0.0, took(100e6))
    for start in (0, 1000, 10_000):
        taken = chunk(measured, decoding=1, start=start)
        expected = (2e5 + by_pair * start) * taken + by_pair * taken * taken / 2
        assert taken == BLOCK or math.isclose(expected, 100e6, rel_tol=BLOCK / taken + 0.01)
