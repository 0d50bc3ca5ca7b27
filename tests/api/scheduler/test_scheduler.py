"""The scheduler against a stage that has only the steps it gets, and against each request running alone."""

import math
from collections import Counter
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from actors.errors import ProtocolError
from api.errors import OptionError, RequestError
from api.messages.engine import AddRequest, RequestOutput
from api.scheduler.kv_cache import new_secret
from api.scheduler.scheduler import Scheduler
from api.scheduler.sequence import Run
from stages.step import GRAMMAR_FAILED, NO_TOKEN, SamplingParams, Step, StepResult, TokenLogprobs
from tests.support.engine_fakes import VOCABULARY, FakeStage, next_token, reference_answer, scores, step_seconds
from tests.support.fake_line import FakeLine
from tests.support.scheduling import GREEDY, nothing_in_use, request, scheduler_options

SCORED = msgspec.structs.replace(GREEDY, logprobs=0, prompt_logprobs=0)


def test_a_burst_spreads_evenly_over_the_microbatches_and_pools() -> None:
    line = FakeLine(scheduler_options(slots=12, pools=2, prefill_chunk=256))
    for request_id in range(6):
        line.scheduler.add_request(request(request_id, 10, 4))
    step = line.submit()
    assert step is not None
    slots = [admission.slot for admission in step.admissions]
    assert sorted(line.microbatch(slot) for slot in slots) == [0, 0, 1, 1, 2, 2]
    assert sorted(slot % 2 for slot in slots) == [0, 0, 0, 1, 1, 1]


def test_the_chunks_of_a_prompt_follow_each_other_without_waiting_for_results() -> None:
    line = FakeLine(scheduler_options())
    line.scheduler.add_request(request(0, 100, 4))
    line.scheduler.add_request(request(1, 40, 4))
    while line.submit():
        pass
    chunks = [[(s.start, len(s.tokens), s.sample) for s in step.segments] for step in line.steps]
    # Request 1 waits for the block border: 28 of the second step's 64 tokens are left, fewer than a block.
    assert chunks == [[(0, 64, False)], [(64, 36, True)], [(0, 40, True)]]
    assert [step.mode for step in line.steps] == ["prefill"] * 3


def test_short_prompts_share_a_step() -> None:
    line = FakeLine(scheduler_options())
    for request_id in range(3):
        line.scheduler.add_request(request(request_id, 10, 4))
    line.scheduler.add_request(request(3, 70, 4))
    step = line.submit()
    assert step is not None
    assert [len(segment.tokens) for segment in step.segments] == [10, 10, 10, 32]


def test_decode_steps_are_not_held_up_by_a_queue_of_prompts() -> None:
    line = FakeLine(scheduler_options(slots=60, blocks=300))
    line.scheduler.add_request(request(0, 10, 100))
    line.submit()
    line.deliver()
    for request_id in range(1, 40):
        line.scheduler.add_request(request(request_id, 100, 20))
    modes = []
    for _ in range(30):
        while step := line.submit():
            modes.append(step.mode)
        line.deliver()
    assert modes[0] == "decode"
    # Every result lets a microbatch decode or a prompt begin; from when all take part, neither gets two in a row.
    assert modes[-20:] == ["prefill", "decode"] * 10 or modes[-20:] == ["decode", "prefill"] * 10


def test_every_microbatch_decodes_in_turn_beside_an_endless_queue_of_prompts() -> None:
    line = FakeLine(scheduler_options(slots=600, blocks=2400))
    for request_id in range(300):
        line.scheduler.add_request(request(request_id, 64, 64))
    for _ in range(120):
        while line.submit():
            pass
        line.deliver()
    assert line.scheduler.counts().waiting > 0
    decoded = [line.microbatch(step.segments[0].slot) for step in line.steps if step.mode == "decode"]
    assert decoded[-30:] == decoded[-3:] * 10
    assert set(decoded[-3:]) == {0, 1, 2}


def test_a_request_waits_until_its_token_after_the_prompt_has_room_too() -> None:
    line = FakeLine(scheduler_options(stages=1, slots=2, blocks=4, prefill_chunk=128))
    line.scheduler.add_request(request(0, 33, 1))
    line.scheduler.add_request(request(1, 64, 1))
    step = line.submit()
    assert step is not None
    # Two blocks are left, which the second prompt alone would fill.
    assert len(step.segments) == 1
    line.deliver()
    step = line.submit()
    assert step is not None
    assert [len(segment.new_blocks) for segment in step.segments] == [3]


def test_a_request_that_does_not_fit_is_not_overtaken() -> None:
    line = FakeLine(scheduler_options(stages=1, slots=3, blocks=5, prefill_chunk=128))
    for request_id, prompt in enumerate((70, 70, 1)):
        line.scheduler.add_request(request(request_id, prompt, 1))
    for _ in range(2):
        step = line.submit()
        assert step is not None
        line.deliver()
    assert [[len(segment.tokens) for segment in step.segments] for step in line.steps] == [[70], [70, 1]]


def test_preempted_requests_of_several_pools_wait_in_the_order_of_arrival() -> None:
    line = FakeLine(scheduler_options(stages=1, slots=8, pools=2, blocks=4, prefill_chunk=256))
    requests = [request(request_id, 20 + 3 * request_id, 60) for request_id in range(8)]
    for added in requests:
        line.scheduler.add_request(added)
    preempted = 0
    while line.scheduler.counts().running + line.scheduler.counts().waiting:
        line.submit()
        waiting = [sequence.arrival for sequence in line.scheduler.snapshot().waiting]
        assert waiting == sorted(waiting)
        preempted = max(preempted, len(waiting))
        line.deliver()
    assert preempted > 2


def test_one_stage_has_one_step_in_flight_by_default() -> None:
    line = FakeLine(scheduler_options(stages=1))
    line.scheduler.add_request(request(0, 100, 2))
    assert line.submit() is not None
    assert line.submit() is None


def test_max_tokens_ends_with_length_and_a_stop_token_is_the_last() -> None:
    line = FakeLine(scheduler_options())
    answer, _ = reference_answer(request(0, 9, 1).tokens, 100, [])
    stop = next(token for token in answer if token != answer[0])
    line.scheduler.add_request(request(0, 9, 100, [stop]))
    line.scheduler.add_request(request(1, 9, 1))
    ended = line.drain()
    assert ended[0] == (answer[: answer.index(stop) + 1], "stop")
    assert ended[1] == reference_answer(request(1, 9, 1).tokens, 1, [])
    assert ended[1][1] == "length"
    assert line.scheduler.counts() == nothing_in_use(line.options)


def test_forced_tokens_take_the_place_of_sampled_ones_which_are_handed_out() -> None:
    """Scores come once over preemptions too: four sequences of four blocks share nine."""
    line = FakeLine(scheduler_options(stages=1, slots=4, blocks=9))
    prompts = [request(request_id, 20, 1).tokens for request_id in range(4)]
    forced = [[(5 * place + number) % VOCABULARY for place in range(90)] for number in range(4)]
    for number in range(4):
        line.scheduler.add_request(
            msgspec.structs.replace(request(number, prompts[number], 100), forced=forced[number])
        )
    ended = line.drain()
    assert line.scheduler.tallies.preemptions > 0
    for number in range(4):
        sampled, reason = ended[number]
        followed = [next_token([*prompts[number], *forced[number][:place]]) for place in range(91)]
        assert sampled[:91] == followed
        assert sampled[91] == next_token([*prompts[number], *forced[number], sampled[90]])
        assert (len(sampled), reason) == (100, "length")


def test_preemption_takes_the_latest_and_changes_no_token() -> None:
    # Four requests of up to four blocks each share five blocks.
    line = FakeLine(scheduler_options(stages=1, slots=4, blocks=5))
    requests = [request(request_id, 20, 100) for request_id in range(4)]
    for added in requests:
        line.scheduler.add_request(added)
    ended = line.drain()
    assert ended == {r.request_id: reference_answer(r.tokens, 100, []) for r in requests}
    assert list(ended) == [0, 1, 2, 3]
    assert len([a for step in line.steps for a in step.admissions]) > 4
    assert line.scheduler.counts() == nothing_in_use(line.options)


def test_an_aborted_request_is_in_no_later_step_and_its_results_are_dropped() -> None:
    line = FakeLine(scheduler_options())
    line.scheduler.add_request(request(0, 100, 9))
    line.submit()
    line.submit()
    line.scheduler.abort(0)
    line.scheduler.abort(0)
    line.scheduler.abort(12345)
    assert line.submit() is None
    assert [line.deliver(), line.deliver()] == [[], []]
    assert line.scheduler.counts() == nothing_in_use(line.options)
    line.scheduler.add_request(request(1, 10, 1))
    step = line.submit()
    assert step is not None
    assert step.ended == [0]
    assert [admission.slot for admission in step.admissions] == [0]


def test_a_reset_runs_everything_again_from_the_tokens_so_far() -> None:
    line = FakeLine(scheduler_options())
    requests = [request(request_id, 40, 30) for request_id in range(5)]
    for added in requests:
        line.scheduler.add_request(added)
    handed_out: dict[int, list[int]] = {r.request_id: [] for r in requests}
    for _ in range(20):
        while line.submit():
            pass
        for output in line.deliver():
            handed_out[output.request_id] += output.tokens
    assert all(handed_out.values())
    stale = list(line.results)
    line.results.clear()
    line.scheduler.reset(epoch=1)
    line.stage = FakeStage(line.options.cache, line.options.prefill_chunk)
    assert line.scheduler.counts().waiting == 5
    assert [line.scheduler.on_result(result) for result in stale] == [[]] * len(stale)
    ended = line.drain()
    for r in requests:
        assert handed_out[r.request_id] + ended[r.request_id][0] == reference_answer(r.tokens, 30, [])[0]


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        (100, 29, "The prompt's 100 tokens and max_tokens 29 make 129, over the model's length of 128"),
        (0, 1, "The prompt holds no token"),
        (1, 0, "max_tokens is 0"),
    ],
)
def test_a_request_that_can_never_run_is_refused(prompt: int, max_tokens: int, message: str) -> None:
    line = FakeLine(scheduler_options())
    with pytest.raises(RequestError, match=message):
        line.scheduler.add_request(request(0, prompt, max_tokens))
    assert line.scheduler.counts() == nothing_in_use(line.options)


def test_a_request_as_long_as_the_model_fits_the_smallest_pool() -> None:
    line = FakeLine(scheduler_options(blocks=4))
    line.scheduler.add_request(request(0, 100, 28))
    line.scheduler.add_request(request(1, 127, 1))
    assert {key: reason for key, (_, reason) in line.drain().items()} == {0: "length", 1: "length"}


def test_an_id_in_use_is_refused() -> None:
    line = FakeLine(scheduler_options())
    line.scheduler.add_request(request(0, 5, 5))
    with pytest.raises(ValueError, match=r"Request 0 is here already\."):
        line.scheduler.add_request(request(0, 5, 5))


def test_a_result_that_is_not_the_awaited_one_is_refused() -> None:
    line = FakeLine(scheduler_options())
    with pytest.raises(ProtocolError, match=r"sent a result of step 3; awaited was none\."):
        line.scheduler.on_result(StepResult(epoch=0, step_id=3, tokens=[]))
    line.scheduler.add_request(request(0, 5, 5))
    line.submit()
    with pytest.raises(ProtocolError, match=r"sent 2 tokens for step 0; awaited was step 0 with 1\."):
        line.scheduler.on_result(StepResult(epoch=0, step_id=0, tokens=[1, 2]))


@pytest.mark.parametrize(
    ("accepted", "tokens", "message"),
    [
        ([], [[], []], r"accepted \[\] drafts of \[2, 2\]"),
        ([1, 3], [[0], [0, 1, 1]], r"accepted \[1, 3\] drafts of \[2, 2\]"),
        ([-1, 1], [[], [0]], r"accepted \[-1, 1\] drafts of \[2, 2\]"),
        ([1, 1], [[0], [1]], r"accepted \[\d+\] in step 1, where the drafts were \[\d+, \d+\]"),
    ],
)
def test_drafts_that_were_not_in_the_step_cannot_be_accepted(
    accepted: list[int], tokens: list[list[int]], message: str
) -> None:
    """`tokens` are places of a request's own drafts: all but the last token of an answer are drafts of the step."""
    line = FakeLine(scheduler_options(stages=1, num_speculative_tokens=2))
    for request_id in range(2):
        line.scheduler.add_request(request(request_id, 10, 30))
    line.submit()
    line.deliver()
    step = line.submit()
    assert step is not None
    answers = [
        [*(segment.tokens[1 + place] for place in places), 0]
        for segment, places in zip(step.segments, tokens, strict=True)
    ]
    flat = [token for answer in answers for token in answer][: 2 + sum(accepted)]
    result = msgspec.structs.replace(line.results[0], tokens=flat, accepted=accepted)
    with pytest.raises(ProtocolError, match=message):
        line.scheduler.on_result(result)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slots": 8}, r"8 slots cannot be shared evenly by 3 microbatches"),
        ({"prefill_chunk": 48}, r"A prefill chunk of 48 tokens is not a multiple of the block size 32"),
        ({"prefill_chunk": 0}, r"A prefill chunk of 0 tokens"),
        ({"microbatches": 0}, r"2 stages with 0 microbatches"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        scheduler_options(**changes)


def test_prompt_logprobs_come_chunk_by_chunk_and_once_in_spite_of_preemption() -> None:
    line = FakeLine(scheduler_options(stages=1, slots=4, blocks=7))
    requests = [request(request_id, 70, 50, sampling=SCORED) for request_id in range(3)]
    for added in requests:
        line.scheduler.add_request(added)
    told: dict[int, list[list[TokenLogprobs]]] = {added.request_id: [] for added in requests}
    while line.scheduler.counts().running + line.scheduler.counts().waiting:
        line.submit()
        for output in line.deliver():
            if output.prompt_logprobs:
                told[output.request_id].append(output.prompt_logprobs)
    assert line.scheduler.tallies.preemptions > 0
    for added in requests:
        assert [entry for chunk in told[added.request_id] for entry in chunk] == scores(added.tokens, 0, 70)
    # The first chunk ends at position 63, whose logits score the token at 64.
    assert [len(chunk) for chunk in told[0]] == [64, 5]


def test_log_probabilities_of_another_number_than_asked_for_are_refused() -> None:
    line = FakeLine(scheduler_options())
    line.scheduler.add_request(request(0, 5, 5, sampling=SCORED))
    line.submit()
    result = line.results.popleft()
    for broken in (
        msgspec.structs.replace(result, prompt_logprobs=[]),
        msgspec.structs.replace(result, logprobs=result.logprobs * 2),
    ):
        with pytest.raises(ProtocolError, match=r"log-probabilities of . tokens and . prompts for step 0"):
            line.scheduler.on_result(broken)


def test_a_prefill_step_takes_no_longer_than_so_many_decode_steps_where_others_wait_for_it() -> None:
    line = FakeLine(scheduler_options(slots=30, blocks=300, max_model_len=2048, prefill_chunk=1024, prefill_wait=6.0))
    line.scheduler.add_request(request(0, 40, 2000))
    for _ in range(4):
        line.submit()
        line.deliver()
    for request_id in range(1, 5):
        line.scheduler.add_request(request(request_id, 1500, 8))
    for _ in range(200):
        while line.submit():
            pass
        line.deliver()
    lengths = [step.token_count for step in line.steps if step.mode == "prefill"]
    decode = max(step_seconds(step) for step in line.steps if step.mode == "decode")
    # Four wait for their first token, and one for its next.
    assert all(step_seconds(step) <= 4 * 6.0 * decode for step in line.steps if step.mode == "prefill")
    assert lengths[0] == 40
    assert sum(lengths) == 40 + 4 * 1500
    assert max(lengths) == 480  # 4 * 6 * 21 is 504: 503 tokens and a millisecond, in whole blocks.
    # At the end one waits, and four decode: 6 * 21 is 126.
    assert step_seconds(max(line.steps[-60:], key=lambda step: step.token_count)) <= 6.0 * decode


def test_a_prompt_that_nobody_waits_for_is_prefilled_in_the_largest_chunks() -> None:
    line = FakeLine(scheduler_options(slots=30, blocks=300, max_model_len=2048, prefill_chunk=1024, prefill_wait=1.0))
    line.scheduler.add_request(request(0, 40, 4))
    line.drain()
    line.scheduler.add_request(request(1, 2000, 4))
    line.drain()
    lengths = [step.token_count for step in line.steps if step.mode == "prefill"]
    # Two stages share the prompt: in an eighth of it at least one of them has nothing to do.
    assert lengths == [40, *[256] * 7, 208]
    line = FakeLine(
        scheduler_options(stages=1, slots=30, blocks=300, max_model_len=2048, prefill_chunk=1024, prefill_wait=1.0)
    )
    line.scheduler.add_request(request(0, 40, 4))
    line.drain()
    line.scheduler.add_request(request(1, 2000, 4))
    line.drain()
    assert [step.token_count for step in line.steps if step.mode == "prefill"] == [40, 1024, 976]


def test_a_request_without_a_token_ends_with_stage_and_step_and_its_neighbours_go_on() -> None:
    line = FakeLine(scheduler_options())
    for request_id in range(3):
        line.scheduler.add_request(request(request_id, 10, 4))
    prefill = line.submit()
    assert prefill is not None
    line.results[0] = msgspec.structs.replace(line.results[0], tokens=[line.results[0].tokens[0], NO_TOKEN, 1])
    broken = line.deliver()[1]
    assert (broken.request_id, broken.tokens, broken.finish_reason) == (1, [], "error")
    assert broken.public == broken.error == f"Stage 1 got logits that are not numbers at step {prefill.step_id}."
    assert sorted(line.drain()) == [0, 2]
    assert line.scheduler.counts() == nothing_in_use(line.options)


@pytest.mark.parametrize(
    ("token", "sentence"),
    [
        (NO_TOKEN, "Stage 0 got logits that are not numbers at step 1."),
        (GRAMMAR_FAILED, "The grammar could not be followed any further"),
    ],
)
def test_drafts_that_were_right_come_before_the_error_of_the_token_behind_them(token: int, sentence: str) -> None:
    line = FakeLine(scheduler_options(stages=1, num_speculative_tokens=2))
    for request_id in range(2):
        line.scheduler.add_request(request(request_id, 30, 20))
    line.submit()
    line.deliver()
    step = line.submit()
    assert step is not None
    _, *drafts = step.segments[0].tokens
    neighbours = [*step.segments[1].tokens[1:], 3]
    line.results[0] = msgspec.structs.replace(
        line.results[0], tokens=[*drafts, token, *neighbours], accepted=[2, len(neighbours) - 1]
    )
    right, broken, other = line.deliver()
    assert (right.request_id, right.tokens, right.finish_reason) == (0, drafts, None)
    assert (broken.request_id, broken.tokens, broken.finish_reason) == (0, [], "error")
    assert broken.error is not None
    assert broken.error.startswith(sentence)
    assert (other.request_id, other.tokens, other.finish_reason) == (1, neighbours, None)
    # The drafts fill the first block, of which the stages get no key.
    assert line.scheduler.cache.findable == 0
    line.scheduler.abort(1)
    assert line.scheduler.counts() == nothing_in_use(line.options)


def test_a_prompt_whose_scores_are_not_numbers_ends_at_its_first_such_chunk() -> None:
    line = FakeLine(scheduler_options())
    line.scheduler.add_request(request(0, 100, 4, sampling=SCORED))
    line.submit()
    [scored] = line.results[0].prompt_logprobs
    scored[3] = msgspec.structs.replace(scored[3], logprob=math.nan)
    [output] = line.deliver()
    assert (output.finish_reason, output.prompt_logprobs) == ("error", [])
    assert line.drain() == {}
    assert line.scheduler.counts() == nothing_in_use(line.options)


class SchedulerMachine(RuleBasedStateMachine):
    """Arrivals, ends, aborts, shortage, preemption, sharing, loads, losses and restarts in any order."""

    @initialize(
        stages=st.integers(1, 3),
        microbatches=st.one_of(st.none(), st.integers(1, 4)),
        lanes=st.integers(1, 3),
        pools=st.integers(1, 2),
        blocks=st.integers(4, 7),
        prefill_chunk=st.sampled_from([32, 64, 128]),
        prefill_wait=st.sampled_from([0.1, 3.0, 50.0]),
        enable_prefix_caching=st.booleans(),
        num_speculative_tokens=st.sampled_from([0, 1, 2, 3, 8]),
        has_tier=st.booleans(),
    )
    def begin(
        self,
        *,
        stages: int,
        microbatches: int | None,
        lanes: int,
        pools: int,
        blocks: int,
        prefill_chunk: int,
        prefill_wait: float,
        enable_prefix_caching: bool,
        num_speculative_tokens: int,
        has_tier: bool,
    ) -> None:
        steps_in_flight = microbatches or (stages + 1 if stages > 1 else 1)
        self.line = FakeLine(
            scheduler_options(
                stages=stages,
                microbatches=microbatches,
                slots=steps_in_flight * lanes * pools,
                pools=pools,
                blocks=blocks,
                prefill_chunk=prefill_chunk,
                prefill_wait=prefill_wait,
                enable_prefix_caching=enable_prefix_caching,
                num_speculative_tokens=num_speculative_tokens,
            )
        )
        self.num_speculative_tokens = num_speculative_tokens
        self.line.stage.tier = {} if has_tier else None
        self.salts: dict[bytes, str] = {}
        self.steps_in_flight = steps_in_flight
        self.scheduler = self.line.scheduler
        self.live: dict[int, AddRequest] = {}
        self.tokens: dict[int, list[int]] = {}
        self.scores: dict[int, list[TokenLogprobs]] = {}
        self.stale: list[StepResult] = []
        self.must_end: set[int] = set()
        self.prefills_waited = [0] * steps_in_flight
        self.epoch = 0

    @rule(
        count=st.integers(1, 4),
        prompt=st.sampled_from([1, 20, 31, 32, 33, 63, 64, 65, 95]),
        max_tokens=st.integers(1, 33),
        stop=st.lists(st.integers(0, VOCABULARY - 1), max_size=1),
        sampling=st.sampled_from([GREEDY, GREEDY, SCORED]),
        family=st.sampled_from([None, 1, 1, 2]),
        cache_salt=st.sampled_from(["", "", "other"]),
    )
    def add(
        self,
        *,
        count: int,
        prompt: int,
        max_tokens: int,
        stop: list[int],
        sampling: SamplingParams,
        family: int | None,
        cache_salt: str,
    ) -> None:
        """Adds requests; prompts of a family begin alike."""
        for _ in range(count):
            tokens = prompt if family is None else [family * position % 7 for position in range(prompt)]
            added = request(len(self.tokens), tokens, max_tokens, stop, sampling, cache_salt)
            self.scores[added.request_id] = []
            self.scheduler.add_request(added)
            self.live[added.request_id] = added
            self.tokens[added.request_id] = []

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.live)))
        running = self.scheduler.snapshot().running
        self.must_end.update(run.slot for run in running if run.request_id == request_id and run.has_begun)
        self.scheduler.abort(request_id)
        aborted = self.live.pop(request_id)
        answer, _ = reference_answer(aborted.tokens, aborted.max_tokens, aborted.stop_token_ids)
        assert self.tokens[request_id] == answer[: len(self.tokens[request_id])]

    @rule()
    def submit(self) -> None:
        ready = self.scheduler.snapshot().ready
        step = self.line.submit()
        if step is None:
            return
        assert step.epoch == self.epoch
        assert self.must_end <= set(step.ended)
        self.must_end = set()
        self.check_order(step)
        self.check_salts(step)
        decoded = {self.line.microbatch(segment.slot) for segment in step.segments} if step.mode == "decode" else set()
        assert len(decoded) <= 1
        still_ready = self.scheduler.snapshot().ready
        for microbatch in range(self.steps_in_flight):
            # One whose requests were all preempted has nothing to wait for.
            waits = microbatch in ready and microbatch in still_ready and microbatch not in decoded
            self.prefills_waited[microbatch] += step.mode == "prefill"
            self.prefills_waited[microbatch] *= waits
        assert max(self.prefills_waited) <= self.steps_in_flight
        running = self.scheduler.snapshot().running
        assert {run.slot for run in running if run.has_begun} == self.line.stage.live_slots
        assert self.shares or not any(segment.keys for segment in step.segments)

    @property
    def shares(self) -> bool:
        return self.line.options.schedule.enable_prefix_caching

    def check_salts(self, step: Step) -> None:
        """Checks that requests share with those of their own salt only, and none where the cache is off."""
        cache = self.scheduler.cache
        for segment in step.segments:
            for key in segment.keys:
                salt = cache.run_in(segment.slot).sequence.cache_salt
                assert self.salts.setdefault(key, salt) == salt
        for admission in step.admissions:
            run = cache.run_in(admission.slot)
            keys = [self.line.stage.key_of(run.pool, block) for block in admission.cached]
            assert {key and self.salts[key] for key in keys} <= {run.sequence.cache_salt}
            assert not keys or (self.shares and run.sequence.sampling.prompt_logprobs is None)

    def check_order(self, step: Step) -> None:
        """Checks that no request which came earlier waits while another is admitted."""
        admitted = {admission.slot for admission in step.admissions}
        snapshot = self.scheduler.snapshot()
        arrivals = [run.arrival for run in snapshot.running if run.slot in admitted]
        waiting = [sequence.arrival for sequence in snapshot.waiting]
        assert waiting == sorted(waiting)
        if arrivals and waiting:
            assert max(arrivals) < min(waiting)

    @precondition(lambda self: self.line.results)
    @rule()
    def deliver(self) -> None:
        for output in self.line.deliver():
            asked = self.live[output.request_id]
            assert output.error is None
            self.tokens[output.request_id] += output.tokens
            self.scores[output.request_id] += output.prompt_logprobs
            is_scored = asked.sampling.logprobs is not None
            assert [entry.logprob for entry in output.logprobs] == [-float(t) for t in output.tokens if is_scored]
            if output.tokens:
                prompt = asked.tokens if is_scored else []
                assert self.scores[output.request_id] == scores(prompt, 0, len(prompt))
            if output.finish_reason is None:
                assert 1 <= len(output.tokens) <= 1 + self.num_speculative_tokens or output.prompt_logprobs
                continue
            del self.live[output.request_id]
            answer = reference_answer(asked.tokens, asked.max_tokens, asked.stop_token_ids)
            assert (self.tokens[output.request_id], output.finish_reason) == answer

    @rule(results=st.integers(1, 60))
    def run(self, results: int) -> None:
        """Runs the pipeline for many results at once, so that requests reach their ends."""
        for _ in range(results):
            self.fill()
            if not self.line.results:
                return
            self.deliver()
            self.books_balance()

    def fill(self) -> None:
        issued = -1
        while issued != len(self.line.steps):
            issued = len(self.line.steps)
            self.submit()

    @rule(lost=st.booleans())
    def reset(self, lost: bool) -> None:
        """An epoch ends, and perhaps what was on the device with it; what was in flight may have been computed."""
        self.epoch += 1
        self.stale += self.line.results
        self.line.results.clear()
        self.line.stage.begin_epoch(lost=lost)
        self.must_end = set()
        self.scheduler.reset(self.epoch)
        assert self.scheduler.counts().waiting == len(self.live)

    @precondition(lambda self: self.line.stage.tier is not None)
    @rule(lost=st.integers(0, 2))
    def report_tier(self, lost: int) -> None:
        """The scheduler hears what the tier has; some of it is gone before it is asked for."""
        tier = self.line.stage.tier
        assert tier is not None
        self.scheduler.cache.know_tiers(set(tier))
        for key in list(tier)[:lost]:
            del tier[key]

    @rule()
    def reset_prefix_cache(self) -> None:
        before = set(self.salts)
        self.scheduler.cache.use_secret(new_secret())
        assert self.scheduler.cache.findable == 0
        assert before.isdisjoint(key for run in self.scheduler.snapshot().running for key in self.keys(run))

    def keys(self, run: Run) -> list[bytes]:
        return self.scheduler.cache.keys(run.sequence, len(run.sequence.tokens))

    @precondition(lambda self: self.stale)
    @rule()
    def deliver_stale(self) -> None:
        assert self.scheduler.on_result(self.stale.pop()) == []

    @invariant()
    def books_balance(self) -> None:
        counts = self.scheduler.counts()
        snapshot = self.scheduler.snapshot()
        running = snapshot.running
        waiting = [sequence.request_id for sequence in snapshot.waiting]
        assert sorted([*(run.request_id for run in running), *waiting]) == sorted(self.live)
        assert (counts.waiting, counts.running) == (len(waiting), len(running))
        assert counts.steps_in_flight == len(self.line.results) <= self.steps_in_flight
        in_flight = self.line.steps[len(self.line.steps) - len(self.line.results) :]
        decoding = [self.line.microbatch(step.segments[0].slot) for step in in_flight if step.mode == "decode"]
        assert len(set(decoding)) == len(decoding)
        slots = [run.slot for run in running]
        assert len(set(slots)) == len(slots) == counts.slots - counts.free_slots
        for index, free in enumerate(snapshot.free_blocks):
            held = Counter(block for run in running if run.pool == index for block in run.blocks)
            assert sorted([*held, *free]) == list(range(self.line.options.cache.blocks))
            assert dict(held) == {block: count for block, count in enumerate(snapshot.holders[index]) if count}
        for run in running:
            assert run.pool == self.line.options.cache.pool_of(run.slot)

    def teardown(self) -> None:
        """The oldest running request gets on within a bounded number of results, and so everything ends."""
        chunks = 128 // self.line.options.cache.block_size  # A chunk may be as short as a block.
        bound = 3 * chunks + 6 * self.steps_in_flight
        stalled, last = 0, (-1, -1)
        while self.live:
            self.fill()
            assert self.line.results, "requests live, and nothing runs"
            self.deliver()
            self.books_balance()
            oldest = min((run.arrival for run in self.scheduler.snapshot().running), default=-1)
            now = (oldest, len(self.tokens[oldest]) if oldest >= 0 else -1)
            stalled = stalled + 1 if now == last else 0
            last = now
            assert stalled <= bound
        while self.line.results:
            self.deliver()
        assert self.scheduler.counts() == nothing_in_use(self.line.options)


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)


@pytest.mark.parametrize("prompt", [1, 31, 32, 33, 127, 128])
def test_a_prompt_that_is_only_scored_may_have_the_whole_length_and_ends_without_a_token(prompt: int) -> None:
    """A pool has just the blocks of one request of the greatest length, with none for a token after it."""
    options = scheduler_options(slots=6, blocks=4, max_model_len=128)
    line = FakeLine(options)
    outputs: list[RequestOutput] = []
    for request_id in range(3):
        line.scheduler.add_request(request(request_id, prompt, 0, sampling=SCORED))
    while line.submit() or line.results:
        outputs += line.deliver() if line.results else []
    for request_id in range(3):
        of_one = [output for output in outputs if output.request_id == request_id]
        assert sum(len(output.prompt_logprobs) for output in of_one) == prompt - 1
        assert [output.finish_reason for output in of_one if output.finish_reason] == ["length"]
        assert not any(output.tokens or output.logprobs for output in of_one)
    assert line.scheduler.counts() == nothing_in_use(options)
    assert line.scheduler.tallies.preemptions == 0


def test_what_is_neither_scored_nor_generated_is_refused() -> None:
    scheduler = Scheduler(scheduler_options(), epoch=0)
    with pytest.raises(RequestError, match="at least one token"):
        scheduler.add_request(request(0, 10, 0))
    with pytest.raises(RequestError, match="129"):
        scheduler.add_request(request(0, 129, 0, sampling=SCORED))
