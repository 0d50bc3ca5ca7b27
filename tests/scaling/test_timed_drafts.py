"""A timed stage verifies and makes drafts: how often they are right, what results have, and how long steps take."""

import itertools
import math

import msgspec
import pytest

from stages.capacity.step_time import StageTimes
from stages.options import CacheOptions, DraftOptions, GivenTimes, PredictedTimes, StageOptions, TimedOptions
from stages.plan import StageSpec
from stages.step import Admission, Mode, SamplingParams, Segment, Step, StepResult
from stages.tensor_dtypes import WeightDtypes
from stages.timed.stage import CONTEXT_TOKENS, DraftMaker, TimedStage, TokenMaker, durations
from tests.support.plans import r1_config
from weights.sample import SAMPLE_DIR

NEVER = [0, 1, 2, 400]
TOKENS = TokenMaker(500, NEVER)
AT_ONCE = GivenTimes(step_s=[0.0])
GREEDY = SamplingParams(temperature=0, top_p=1, top_k=0, seed=0, choice=0)
CACHE = CacheOptions(slots=4, pools=1, blocks=64, block_size=32, max_model_len=512)
R1 = r1_config()
LAST = StageSpec(index=7, stages=8, first_layer=55, end_layer=61)
OTHER = StageSpec(index=3, stages=8, first_layer=24, end_layer=31)


def options(times: GivenTimes | PredictedTimes = AT_ONCE, seed: int = 0) -> StageOptions:
    return StageOptions(
        model_path=str(SAMPLE_DIR),
        cache_dir="",
        dtype="bfloat16",
        seed=seed,
        cache=CACHE,
        timed=TimedOptions(times=times, vocabulary=500, never=NEVER, acceptance=0.5),
        drafts=DraftOptions(num_speculative_tokens=4),
    )


def stage(seed: int = 0) -> TimedStage:
    return TimedStage.load(
        StageSpec(index=0, stages=1, first_layer=0, end_layer=6), options(seed=seed), lambda _, __: None
    )


def step(mode: Mode, segments: list[tuple[int, list[int]]], drafts: int = 4, logprobs: int | None = None) -> Step:
    """A step with a segment of each slot, of (start, tokens), that asks for drafts."""
    sampling = msgspec.structs.replace(GREEDY, logprobs=logprobs)
    return Step(
        epoch=1,
        step_id=1,
        mode=mode,
        segments=[
            Segment(slot=slot, start=start, tokens=tokens, new_blocks=[], sample=True, drafts=drafts)
            for slot, (start, tokens) in enumerate(segments)
        ],
        admissions=[Admission(slot=slot, sampling=sampling) for slot in range(len(segments))],
        ended=[],
    )


def run(timed: TimedStage, asked: Step) -> StepResult:
    result = timed.step(asked, memoryview(b""))
    assert isinstance(result, StepResult)
    return result


def text(token: int, position: int, count: int) -> list[int]:
    """What truly follows a token."""
    followed = [token]
    for place in range(position, position + count):
        followed.append(TOKENS.after(followed[-1], place))
    return followed[1:]


def right_ones(drafts: list[int], truth: list[int]) -> list[int]:
    """The drafts before the first wrong one."""
    pairs = zip(drafts, truth, strict=False)
    return [draft for draft, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.8, 1.0])
def test_drafts_are_right_as_often_as_is_asked(acceptance: float) -> None:
    count = 10_000
    maker = DraftMaker(TOKENS, acceptance, seed=5)
    right = 0
    for slot, position in itertools.product(range(20), range(count // 20)):
        token = 3 + (slot + position) % 400
        [draft] = maker.after(slot, token, position, 1)
        assert draft not in NEVER
        right += draft == TOKENS.after(token, position)
    # Five standard deviations of a binomial distribution, of which one run in two million is outside.
    assert abs(right - count * acceptance) <= 5 * math.sqrt(count * acceptance * (1 - acceptance))


def test_later_drafts_are_right_as_often_where_those_before_them_are() -> None:
    maker = DraftMaker(TOKENS, 0.8, seed=1)
    accepted = []
    for position in range(5000):
        drafts = maker.after(0, 7, position, 3)
        truth = text(7, position, 3)
        accepted.append(len(right_ones(drafts, truth)))
    for place in range(3):
        reached = [count for count in accepted if count >= place]
        assert sum(count > place for count in reached) / len(reached) == pytest.approx(0.8, abs=0.04)


def test_drafts_follow_from_seed_slot_token_and_position_alone() -> None:
    made = [DraftMaker(TOKENS, 0.5, seed).after(slot, 9, at, 40) for seed in (1, 2) for slot in (0, 1) for at in (5, 6)]
    assert len({tuple(drafts) for drafts in made}) == len(made)
    assert DraftMaker(TOKENS, 0.5, 2).after(1, 9, 6, 40) == made[-1]
    again = [run(stage(seed), step("decode", [(30, [8]), (30, [8])])).drafts for seed in (1, 1, 2)]
    assert again[0] == again[1] != again[2]
    assert again[0][0] != again[0][1]


def test_a_token_is_what_follows_whatever_was_drafted() -> None:
    truth = text(9, 40, 4)
    wrong = [TOKENS.other(token) for token in truth]
    cases = [truth[:3], [*truth[:2], wrong[2]], [wrong[0], *truth[1:3]], wrong[:3]]
    result = run(stage(), step("decode", [(40, [9, *drafts]) for drafts in cases]))
    assert result.accepted == [3, 2, 0, 0]
    assert result.tokens == [*truth[:4], *truth[:3], truth[0], truth[0]]


def test_a_wrong_draft_is_never_accepted_and_a_right_one_always() -> None:
    timed = stage()
    token, position, drafts = 9, 40, [5]
    for _ in range(200):
        truth = text(token, position, len(drafts) + 1)
        right = right_ones(drafts, truth)
        result = run(timed, step("decode", [(position, [token, *drafts])]))
        assert result.accepted == [len(right)]
        assert result.tokens == truth[: len(right) + 1]
        [drafts] = result.drafts
        position += len(result.tokens)
        token = result.tokens[-1]
        assert drafts == DraftMaker(TOKENS, 0.5, 0).after(0, token, position, 4)


def test_a_prompt_is_followed_by_drafts_of_what_comes_after_its_first_token() -> None:
    result = run(stage(), step("prefill", [(0, [5, 6, 7]), (32, [8])]))
    assert result.accepted == []
    assert result.tokens == [TOKENS.after(7, 2), TOKENS.after(8, 32)]
    maker = DraftMaker(TOKENS, 0.5, 0)
    assert result.drafts == [maker.after(0, result.tokens[0], 3, 4), maker.after(1, result.tokens[1], 33, 4)]


def test_results_without_drafts_say_nothing_of_them() -> None:
    result = run(stage(), step("decode", [(40, [9])], drafts=0))
    assert (result.accepted, result.drafts, len(result.tokens)) == ([], [], 1)


def test_every_token_has_its_log_probabilities() -> None:
    truth = text(9, 40, 3)
    result = run(stage(), step("decode", [(40, [9, *truth[:2]]), (40, [9])], logprobs=0))
    assert [entry and entry.top_tokens for entry in result.logprobs] == [[token] for token in [*truth, truth[0]]]
    assert result.accepted == [2, 0]


def decode(users: int, tokens: int, drafts: int) -> Step:
    return step("decode", [(CONTEXT_TOKENS - 1, [5] * tokens)] * users, drafts)


def test_given_times_are_those_of_all_steps_whatever_their_drafts() -> None:
    found = durations(R1, LAST, options(GivenTimes(step_s=[0.1])))
    assert found.seconds(decode(5, 1, 0)) == found.seconds(decode(5, 4, 3)) == 0.1


@pytest.mark.parametrize("spec", [OTHER, LAST])
def test_predicted_times_are_those_of_the_lanes_and_of_the_drafts_that_are_made(spec: StageSpec) -> None:
    found = durations(R1, spec, options(PredictedTimes(rows=2)))
    plan = StageTimes(R1, spec, 2, WeightDtypes())
    # Of five users on two rows, the fuller one has three.
    assert found.seconds(decode(5, 3, 2)) == plan.decode_lanes(3, 8, CONTEXT_TOKENS, passes=2).total_s
    assert found.seconds(decode(6, 3, 2)) == plan.decode(3, CONTEXT_TOKENS, drafts=2).total_s
    assert found.seconds(decode(6, 3, 0)) == plan.decode_lanes(3, 9, CONTEXT_TOKENS, passes=0).total_s
    assert found.seconds(decode(6, 1, 2)) == plan.decode_lanes(3, 3, CONTEXT_TOKENS, passes=2).total_s
    assert found.seconds(decode(6, 1, 0)) == plan.decode(3, CONTEXT_TOKENS).total_s


def test_a_prompts_chunks_pass_the_draft_layer_once_and_its_last_one_for_every_draft() -> None:
    found = durations(R1, LAST, options(PredictedTimes(rows=1)))
    plan = StageTimes(R1, LAST, 1, WeightDtypes())
    last = step("prefill", [(32, [5] * 64)], drafts=3)
    assert found.seconds(last) == plan.prefill(64, 32, drafts=3).total_s
    earlier = msgspec.structs.replace(last, segments=[msgspec.structs.replace(last.segments[0], sample=False)])
    assert found.seconds(earlier) == plan.prefill(64, 32, drafts=1).total_s
