"""Predicted speeds follow from predicted steps, and drafts pay where they give more tokens in the same time."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.capacity.chip_memory import chip_stages
from stages.capacity.prediction import (
    DraftPrediction,
    Prediction,
    PredictionOptions,
    predict,
    stage_times,
    tokens_per_step,
)
from tests.support.plans import deployment, r1_config

R1 = r1_config()
OPTIONS = PredictionOptions(context=2048, prompt_tokens=1024)
GUESSED = msgspec.structs.replace(OPTIONS, acceptance=0.8, traced=True)


def test_a_full_pipeline_is_as_fast_as_its_slowest_stage() -> None:
    plan = deployment(4, 4)
    prediction = predict(R1, plan, OPTIONS)
    slowest = max(time.total_s for time in prediction.decode)
    assert prediction.cycle_s == pytest.approx(5 * slowest)
    assert prediction.tokens_per_s == pytest.approx(32 * 4 / slowest)
    assert prediction.tokens_per_s_per_user == pytest.approx(prediction.tokens_per_s / 640)


def test_one_microbatch_waits_for_every_stage_and_hop() -> None:
    prediction = predict(R1, deployment(4, 4, microbatches=1), OPTIONS)
    passed = sum(time.total_s for time in prediction.decode)
    assert prediction.cycle_s == pytest.approx(passed + 3 * prediction.hop_s)


def test_the_first_token_waits_for_all_chunks() -> None:
    one, four = (predict(R1, deployment(4, 4), msgspec.structs.replace(OPTIONS, prompt_tokens=n)) for n in (256, 1024))
    slowest = max(time.total_s for time in four.prefill)
    assert four.ttft_s - one.ttft_s == pytest.approx(3 * slowest, rel=0.2)


def drafted(stages: int, drafts: int, acceptance: float, **changes: int) -> tuple[Prediction, DraftPrediction]:
    """The prediction of stages of one row that draft so many tokens, and its part for that."""
    options = msgspec.structs.replace(GUESSED, acceptance=acceptance)
    prediction = predict(R1, deployment(stages, 1, num_speculative_tokens=drafts, **changes), options)
    assert prediction.drafts is not None
    return prediction, prediction.drafts


@given(st.floats(0, 1), st.integers(0, 8))
def test_a_step_yields_the_drafts_before_the_first_wrong_one_and_a_token_more(acceptance: float, drafts: int) -> None:
    ends = [acceptance**right * (1 - acceptance) for right in range(drafts)]
    mean = sum((right + 1) * end for right, end in enumerate(ends)) + (drafts + 1) * acceptance**drafts
    assert tokens_per_step(acceptance, drafts) == pytest.approx(mean)


def test_nothing_is_predicted_of_drafts_that_are_not_made_or_whose_worth_is_not_known() -> None:
    assert predict(R1, deployment(8, 1), GUESSED).drafts is None
    assert predict(R1, deployment(8, 1, num_speculative_tokens=1), OPTIONS).drafts is None


@pytest.mark.parametrize("drafts", [1, 2, 3])
def test_with_drafts_a_cycle_takes_longer_and_yields_more(drafts: int) -> None:
    plan = deployment(8, 1, num_speculative_tokens=drafts)
    without, found = drafted(8, drafts, 0.8)
    stages = stage_times(R1, chip_stages(R1, plan), plan, GUESSED)
    assert without.decode == [stage.decode(32, 2048) for stage in stages]
    assert found.decode == [stage.decode(32, 2048, drafts=drafts) for stage in stages]
    assert found.cycle_s == pytest.approx(9 * max(time.total_s for time in found.decode))
    assert found.cycle_s > without.cycle_s
    assert found.tokens_per_s_per_user == pytest.approx(tokens_per_step(0.8, drafts) / found.cycle_s)
    assert found.tokens_per_s == pytest.approx(288 * found.tokens_per_s_per_user)
    assert without.served_tokens_per_s == found.tokens_per_s > without.tokens_per_s


def test_with_drafts_hidden_states_of_more_lanes_pass_between_stages() -> None:
    without, found = drafted(16, 3, 0.8, microbatches=1)
    hops_s = found.cycle_s - sum(time.total_s for time in found.decode)
    assert hops_s > 15 * without.hop_s


def test_drafts_pay_where_more_tokens_come_in_the_same_time() -> None:
    pays = {}
    for acceptance in (0.0, 0.02, 0.1, 0.5, 1.0):
        without, found = drafted(16, 3, acceptance)
        pays[acceptance] = found.pays
        assert found.pays == (found.tokens_per_s > without.tokens_per_s)
        assert without.served_tokens_per_s == max(found.tokens_per_s, without.tokens_per_s)
    assert list(pays.values()) == sorted(pays.values())
    assert (pays[0.0], pays[1.0]) == (False, True)


def test_the_first_token_waits_for_the_draft_layer_too() -> None:
    without = predict(R1, deployment(8, 1, layers_per_stage=(10, 7, 7, 7, 8, 8, 8, 6)), GUESSED)
    found, _ = drafted(8, 1, 0.8)
    assert found.prefill[:-1] == without.prefill[:-1]
    assert found.ttft_s > without.ttft_s
