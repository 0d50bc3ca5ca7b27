"""A timed stage alone: its duration, its hidden states and its tokens, and that it does not import torch."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stages.capacity.step_time import StageTimes
from stages.errors import PlanError
from stages.options import CacheOptions, GivenTimes, PredictedTimes, StageOptions, TimedOptions
from stages.plan import StageSpec, plan_stages
from stages.step import Admission, SamplingParams, Segment, Step, StepResult
from stages.tensor_dtypes import WeightDtypes
from stages.timed.stage import CONTEXT_TOKENS, RECENT, TimedStage, durations
from tests.support.plans import r1_config
from weights.presets import preset_directory
from weights.sample import SAMPLE_DIR

HIDDEN_BYTES = 256 * 2
GREEDY = SamplingParams(temperature=0, top_p=1, top_k=0, seed=0, choice=0)
CACHE = CacheOptions(slots=4, pools=1, blocks=64, block_size=32, max_model_len=512)


def spec(index: int = 0, stages: int = 1) -> StageSpec:
    return StageSpec(index=index, stages=stages, first_layer=index, end_layer=index + 1)


def options(times: GivenTimes | PredictedTimes, model: Path = SAMPLE_DIR) -> StageOptions:
    timed = TimedOptions(times=times, vocabulary=500, never=[0, 1, 2])
    return StageOptions(
        model_path=str(model),
        cache_dir="",
        dtype="bfloat16",
        seed=0,
        cache=CACHE,
        timed=timed,
    )


def stage(index: int = 0, stages: int = 1) -> TimedStage:
    return TimedStage.load(spec(index, stages), options(GivenTimes(step_s=[0.0])), lambda _, __: None)


def prefill(tokens: list[int], start: int = 0, sampling: SamplingParams = GREEDY) -> Step:
    segment = Segment(slot=0, start=start, tokens=tokens, new_blocks=[], sample=True)
    admission = Admission(slot=0, sampling=sampling, tokens=tokens, prompt_tokens=len(tokens))
    return Step(epoch=1, step_id=1, mode="prefill", segments=[segment], admissions=[admission], ended=[])


def decode(tokens: list[int], start: int) -> Step:
    segments = [
        Segment(slot=slot, start=start, tokens=[token], new_blocks=[], sample=True) for slot, token in enumerate(tokens)
    ]
    admissions = [Admission(slot=slot, sampling=GREEDY) for slot in range(len(tokens))]
    return Step(epoch=1, step_id=2, mode="decode", segments=segments, admissions=admissions, ended=[])


def tokens_of(output: memoryview | StepResult) -> list[int]:
    assert isinstance(output, StepResult)
    return output.tokens


def test_the_first_stage_makes_hidden_states_of_the_right_length_and_others_pass_them_on() -> None:
    made = stage(0, 3).step(prefill([5, 6, 7]), memoryview(b""))
    assert isinstance(made, memoryview)
    assert made.nbytes == 3 * HIDDEN_BYTES
    assert stage(1, 3).step(prefill([5, 6, 7]), made) is made


def test_the_first_stage_keeps_the_memory_of_its_hidden_states() -> None:
    first = stage(0, 2)
    longer, shorter = (first.step(prefill([5] * count), memoryview(b"")) for count in (9, 3))
    assert isinstance(longer, memoryview)
    assert isinstance(shorter, memoryview)
    assert longer.obj is shorter.obj


def test_a_text_is_the_same_however_often_it_is_replayed() -> None:
    last = stage()
    text = [5, 6, 7]
    for _ in range(5):
        text += tokens_of(last.step(decode([text[-1]], len(text) - 1), memoryview(b"")))
    for known in range(3, len(text)):
        # After a preemption, the text so far comes back as one prompt.
        assert tokens_of(last.step(prefill(text[:known]), memoryview(b""))) == [text[known]]


def test_logprobs_are_those_of_a_model_that_is_certain() -> None:
    result = stage().step(prefill([5, 6, 7], sampling=_with(logprobs=1, prompt_logprobs=1)), memoryview(b""))
    assert isinstance(result, StepResult)
    [logprobs] = result.logprobs
    assert logprobs is not None
    assert (logprobs.top_tokens, logprobs.logprob) == (result.tokens, 0.0)
    [prompt] = result.prompt_logprobs
    assert [scores.top_tokens for scores in prompt] == [[6], [7]]


def _with(**fields: Any) -> SamplingParams:
    return SamplingParams(temperature=0, top_p=1, top_k=0, seed=0, choice=0, **fields)


class Clock:
    """A clock that moves only by sleeps and work, with sleeps that end 0.1 ms late."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds + 0.0001


@pytest.mark.parametrize("work_s", [0.0, 0.001, 0.5])
def test_a_steps_time_counts_from_its_beginning(work_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = TimedStage.load(spec(0, 2), options(GivenTimes(step_s=[0.25])), lambda _, __: None)
    clock = Clock()
    monkeypatch.setattr("stages.timed.stage.time", SimpleNamespace(monotonic=clock.monotonic, sleep=clock.sleep))

    def work(*_: object) -> memoryview:
        clock.now_s += work_s
        return memoryview(b"")

    monkeypatch.setattr(timed, "_output", work)
    took = []
    for _ in range(RECENT + 1):
        began_s = clock.now_s
        timed.step(prefill([5]), memoryview(b""))
        took.append(clock.now_s - began_s)
    least = max(0.25, work_s)
    assert took[0] == pytest.approx(least if work_s > 0.25 else least + 0.0001)
    # By then the first wait, for which no delay was known, is no longer among the recent ones.
    assert took[-1] == pytest.approx(least)


def test_given_times_are_those_of_the_stage_and_prompts_take_longer() -> None:
    times = options(GivenTimes(step_s=[0.1, 0.2], prompt_token_s=0.01))
    second = durations(r1_config(), spec(1, 2), times)
    assert second.seconds(decode([5, 6], 3)) == 0.2
    assert second.seconds(prefill([5, 6, 7])) == pytest.approx(0.23)
    one_for_all = durations(r1_config(), spec(1, 2), options(GivenTimes(step_s=[0.1])))
    assert one_for_all.seconds(decode([5], 3)) == 0.1


def test_as_many_times_as_stages_or_one_have_to_be_given() -> None:
    with pytest.raises(PlanError, match=r"--stage-time gives 2 times for 3 stages"):
        durations(r1_config(), spec(0, 3), options(GivenTimes(step_s=[0.1, 0.2])))


def test_predicted_times_are_those_of_the_plan() -> None:
    config = r1_config()
    part = plan_stages(config, 8)[3]
    found = durations(config, part, options(PredictedTimes(rows=2)))
    plan = StageTimes(config, part, 2, WeightDtypes())
    # Of five users on two rows, the fuller one has three.
    assert found.seconds(decode([5] * 5, CONTEXT_TOKENS - 1)) == plan.decode(3, CONTEXT_TOKENS).total_s
    assert found.seconds(prefill([5] * 64, start=32)) == plan.prefill(64, 32).total_s


def test_a_prediction_is_made_once_for_steps_that_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    config = r1_config()
    asked: list[tuple[int, int]] = []
    original: Callable[..., Any] = StageTimes.decode_lanes

    def counted(self: StageTimes, users: int, lanes: int, context: int, *, passes: int) -> Any:
        asked.append((users, context))
        return original(self, users, lanes, context, passes=passes)

    monkeypatch.setattr(StageTimes, "decode_lanes", counted)
    found = durations(config, plan_stages(config, 8)[0], options(PredictedTimes(rows=1)))
    for position in range(3 * CONTEXT_TOKENS):
        found.seconds(decode([5], position))
    assert asked == [(1, CONTEXT_TOKENS), (1, 2 * CONTEXT_TOKENS), (1, 3 * CONTEXT_TOKENS)]


STEPPING = f"""
import sys
from pathlib import Path
from stages.options import CacheOptions, StageOptions
from stages.plan import StageSpec
from stages.step import Admission, SamplingParams, Segment, Step
from stages.options import PredictedTimes, TimedOptions
from stages.timed.stage import TimedStage
import actors.stage.actor
cache = CacheOptions(slots=4, pools=1, blocks=64, block_size=32, max_model_len=512)
timed = TimedOptions(times=PredictedTimes(rows=1), vocabulary=500, never=[])
options = StageOptions(model_path={str(SAMPLE_DIR)!r}, cache_dir="", dtype="bfloat16", seed=0,
                       cache=cache, timed=timed)
stage = TimedStage.load(StageSpec(index=0, stages=1, first_layer=0, end_layer=6), options, lambda _, __: None)
sampling = SamplingParams(temperature=0, top_p=1, top_k=0, seed=0, choice=0)
step = Step(epoch=1, step_id=1, mode="prefill", ended=[], admissions=[Admission(slot=0, sampling=sampling)],
            segments=[Segment(slot=0, start=0, tokens=[5], new_blocks=[], sample=True)])
assert len(stage.step(step, memoryview(b"")).tokens) == 1
print(sorted({{"torch", "transformers", "ttnn"}} & set(sys.modules)))
"""


def test_a_process_that_steps_a_stage_never_imports_torch() -> None:
    done = subprocess.run([sys.executable, "-c", STEPPING], check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_r1_needs_no_checkpoint() -> None:
    path = preset_directory("r1")
    assert sorted(file.name for file in path.iterdir()) == ["config.json"]
    loaded = TimedStage.load(
        plan_stages(r1_config(), 61)[60], options(GivenTimes(step_s=[0.0]), path), lambda _, __: None
    )
    assert len(tokens_of(loaded.step(decode([5], 3), memoryview(bytes(2 * 7168))))) == 1
