"""The timed device under the scheduler: no schedule changes tokens, and results have the right form."""

import time
from collections import deque
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.messages.engine import AddRequest
from api.scheduler.options import ScheduleOptions, SchedulerOptions
from api.scheduler.scheduler import Scheduler
from stages.errors import PlanError
from stages.options import CacheOptions, GivenTimes, StageOptions
from stages.plan import StageSpec
from stages.step import SamplingParams, Segment, Step, StepResult, TokenLogprobs
from stages.timed.stage import DraftMaker, GivenDurations, TimedStage, TokenMaker, certain

BLOCK = 32
BYTES_PER_TOKEN = 6
VOCABULARY = 40
NEVER = [0, 1, 17, 39]
PLAIN = SamplingParams(temperature=1.0, top_p=0.9, top_k=5, seed=3, choice=0)
TOKENS = TokenMaker(VOCABULARY, NEVER)


def timed_stages(count: int, step_s: Sequence[float] = (0.0,)) -> list[TimedStage]:
    specs = [StageSpec(index=index, stages=count, first_layer=index, end_layer=index + 1) for index in range(count)]
    times = GivenTimes(step_s=list(step_s))
    drafts = DraftMaker(TOKENS, 0.7, seed=0)
    return [TimedStage(spec, GivenDurations(times, spec.index), BYTES_PER_TOKEN, TOKENS, drafts) for spec in specs]


def run(stages: Sequence[TimedStage], step: Step) -> StepResult:
    """Runs a step through all stages, and checks the length of the hidden states."""
    hidden = memoryview(b"")
    for stage in stages[:-1]:
        output = stage.step(step, hidden)
        assert isinstance(output, memoryview)
        assert output.nbytes == step.token_count * BYTES_PER_TOKEN
        hidden = output
    result = stages[-1].step(step, hidden)
    assert isinstance(result, StepResult)
    return result


def answer(prompt: Sequence[int], count: int) -> list[int]:
    """The tokens that a request gets: each follows from the one before it and its position alone."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(TOKENS.after(tokens[-1], len(tokens) - 1))
    return tokens[len(prompt) :]


@st.composite
def requests(draw: st.DrawFn) -> list[AddRequest]:
    """Requests, of which some want log-probabilities of their prompt or their answer."""
    made = []
    for request_id in range(draw(st.integers(1, 6))):
        sampling = msgspec.structs.replace(
            PLAIN,
            logprobs=draw(st.sampled_from([None, 0, 3])),
            prompt_logprobs=draw(st.sampled_from([None, 0])),
        )
        prompt = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=80))
        made.append(
            AddRequest(
                request_id=request_id,
                tokens=prompt,
                max_tokens=draw(st.integers(1, 40)),
                stop_token_ids=[],
                sampling=sampling,
            )
        )
    return made


class Told:
    """What a request has got so far."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs] = []


@settings(max_examples=60, deadline=None)
@given(
    added=requests(),
    stages=st.integers(1, 4),
    microbatches=st.integers(1, 3),
    blocks=st.integers(4, 12),
    chunk=st.sampled_from([32, 64, 96]),
    drafts=st.integers(0, 4),
    delivers=st.lists(st.booleans(), max_size=200),
)
def test_tokens_are_the_same_however_they_are_scheduled(
    added: list[AddRequest], stages: int, microbatches: int, blocks: int, chunk: int, drafts: int, delivers: list[bool]
) -> None:
    """Any number of stages, chunks, microbatches and drafts, and so few blocks that requests are preempted."""
    cache = CacheOptions(slots=3 * microbatches, pools=1, blocks=blocks, block_size=BLOCK, max_model_len=128)
    scheduler = Scheduler(
        SchedulerOptions(
            stages=stages,
            cache=cache,
            prefill_chunk=chunk,
            schedule=ScheduleOptions(microbatches=microbatches),
            num_speculative_tokens=drafts,
        ),
        epoch=0,
    )
    line = timed_stages(stages)
    told = {request.request_id: Told() for request in added}
    for request in added:
        scheduler.add_request(request)
    results: deque[StepResult] = deque()
    waits = deque(delivers)
    while True:
        step = None if results and waits and waits.popleft() else scheduler.next_step()
        if step is not None:
            results.append(run(line, step))
            continue
        if not results:
            break
        for output in scheduler.on_result(results.popleft()):
            told[output.request_id].tokens += output.tokens
            told[output.request_id].logprobs += output.logprobs
            told[output.request_id].prompt_logprobs += output.prompt_logprobs
    for request in added:
        sampling, got = request.sampling, told[request.request_id]
        expected = answer(request.tokens, request.max_tokens)
        assert got.tokens == expected
        assert got.logprobs == ([] if sampling.logprobs is None else [certain(token) for token in expected])
        scored = [] if sampling.prompt_logprobs is None else [certain(token) for token in request.tokens[1:]]
        assert got.prompt_logprobs == scored


def test_a_step_never_ends_before_its_time() -> None:
    [first, last] = timed_stages(2, step_s=[0.004, 0.002])
    segment = Segment(slot=0, start=0, tokens=[4], new_blocks=[], sample=False)
    step = Step(epoch=0, step_id=0, mode="decode", segments=[segment], admissions=[], ended=[])
    for stage, step_s, hidden in ((first, 0.004, b""), (last, 0.002, bytes(BYTES_PER_TOKEN))):
        for _ in range(10):
            began = time.monotonic()
            stage.step(step, memoryview(hidden))
            assert time.monotonic() - began >= step_s


def test_a_stage_that_was_told_no_times_is_refused() -> None:
    cache = CacheOptions(slots=1, pools=1, blocks=4, block_size=BLOCK, max_model_len=128)
    options = StageOptions(model_path="absent", cache_dir="absent", dtype="bfloat16", seed=0, cache=cache)
    spec = StageSpec(index=0, stages=1, first_layer=0, end_layer=1)
    with pytest.raises(PlanError, match="was not told how long steps take"):
        TimedStage.load(spec, options, lambda done, layers: None)
