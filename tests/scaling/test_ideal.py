"""The ideal of a pipeline, against a pipeline that is simulated step by step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.scaling.ideal import Ideal, percentile

TIMES = st.lists(st.integers(1, 50), min_size=1, max_size=8)


def ideal(decode: list[int], microbatches: int, users: int = 4) -> Ideal:
    times = [float(time) for time in decode]
    return Ideal(decode_s=times, prefill_s=times, microbatches=microbatches, users=users)


def played_cycle(decode: list[int], microbatches: int) -> float:
    """Time units between two tokens of a user in the long run; a stage runs one step at a time, first come first."""
    rounds = 60
    free = [0] * len(decode)
    back = [0] * microbatches
    at_half = 0
    for turn in range(rounds):
        if turn == rounds // 2:
            at_half = back[0]
        for microbatch in range(microbatches):
            at = back[microbatch]
            for stage, duration in enumerate(decode):
                at = free[stage] = max(at, free[stage]) + duration
            back[microbatch] = at
    return (back[0] - at_half) / (rounds - rounds // 2)


@given(TIMES, st.integers(1, 10))
def test_the_cycle_is_that_of_a_pipeline_played_through(decode: list[int], microbatches: int) -> None:
    assert ideal(decode, microbatches).cycle_s == pytest.approx(played_cycle(decode, microbatches), rel=1e-9)


def test_equal_stages_give_a_token_to_each_user_of_a_microbatch_every_stage_time() -> None:
    assert ideal([10] * 4, microbatches=5).tokens_per_s == pytest.approx(4 / 10)
    assert ideal([10] * 4, microbatches=4).tokens_per_s == pytest.approx(4 / 10)
    assert ideal([10] * 4, microbatches=1).tokens_per_s == pytest.approx(4 / 40)


@given(TIMES, st.integers(1, 10))
def test_stages_that_share_the_work_evenly_are_never_slower(decode: list[int], microbatches: int) -> None:
    given_times = ideal(decode, microbatches)
    assert given_times.equal_tokens_per_s >= given_times.tokens_per_s * (1 - 1e-9)
    assert given_times.first_token_s == sum(decode)


@given(st.lists(st.integers(0, 100), min_size=1), st.floats(0.01, 1))
def test_a_percentile_is_the_least_value_that_the_share_does_not_exceed(values: list[int], share: float) -> None:
    found = percentile([float(value) for value in values], share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values) - 1e-9
    assert sum(value < found for value in values) < share * len(values)


def test_of_no_values_there_is_no_percentile() -> None:
    assert percentile([], 0.5) == 0
