"""What requests share, and what they never do; answers are checked against each request running alone."""

from typing import Any

import msgspec
import pytest

from actors.errors import PipelineError
from api.messages.engine import AddRequest
from api.scheduler.kv_cache import new_secret
from stages.step import NO_TOKEN
from tests.support.engine_fakes import reference_answer
from tests.support.fake_line import FakeLine
from tests.support.scheduling import BLOCK, GREEDY, request, scheduler_options

SCORED = msgspec.structs.replace(GREEDY, prompt_logprobs=0)


def line_of(*, has_tier: bool = False, **changes: int) -> FakeLine:
    given: dict[str, Any] = {
        "stages": 4,
        "slots": 10,
        "blocks": 64,
        "max_model_len": 512,
        "prefill_chunk": 128,
    } | changes
    line = FakeLine(scheduler_options(**given))
    line.stage.tier = {} if has_tier else None
    return line


def beginning(request_id: int, shared: int, own: int, max_tokens: int = 4, **given: Any) -> AddRequest:
    """A request whose first `shared` tokens are those of all others."""
    tokens = [*range(shared), *(1000 + request_id for _ in range(own))]
    return msgspec.structs.replace(request(request_id, tokens, max_tokens), **given)


def run(line: FakeLine, *requests: AddRequest) -> dict[int, int]:
    """Runs requests, which have their answers alone; returns the cached tokens of each."""
    cached: dict[int, int] = {}
    tokens: dict[int, list[int]] = {added.request_id: [] for added in requests}
    for added in requests:
        line.scheduler.add_request(added)
    while True:
        while line.submit():
            pass
        if not line.results:
            break
        for output in line.deliver():
            tokens[output.request_id] += output.tokens
            cached[output.request_id] = output.cached_tokens
    for added in requests:
        assert tokens[added.request_id] == reference_answer(added.tokens, added.max_tokens, [])[0]
    return cached


@pytest.mark.parametrize(("length", "cached"), [(31, 0), (32, 0), (33, 32), (64, 32), (65, 64), (100, 96)])
def test_a_prompt_that_comes_again_is_cached_but_for_its_last_token_at_least(length: int, cached: int) -> None:
    line = line_of()
    assert run(line, beginning(0, length, 0)) == {0: 0}
    assert run(line, beginning(1, length, 0)) == {1: cached}
    assert line.stage.computed == 2 * length - cached
    assert (line.scheduler.tallies.prefix_queries, line.scheduler.tallies.prefix_hits) == (2 * length, cached)


def test_the_next_turn_of_a_conversation_finds_the_answer_before_it_too() -> None:
    line = line_of()
    first = beginning(0, 50, 0, max_tokens=40)
    run(line, first)
    answer, _ = reference_answer(first.tokens, 40, [])
    turn = request(1, [*first.tokens, *answer, 7, 7, 7], 4)
    # The last token of an answer is never in the cache: 89 of 90 tokens are, and so two whole blocks.
    assert run(line, turn) == {1: 64}


def test_a_burst_shares_what_the_first_of_it_is_only_computing() -> None:
    line = line_of(prefill_chunk=64)
    cached = run(line, *(beginning(number, 200, 5) for number in range(8)))
    assert cached == {0: 0} | dict.fromkeys(range(1, 8), 192)
    assert line.stage.computed == 205 + 7 * 13


def test_requests_of_one_step_do_not_read_what_it_writes() -> None:
    line = line_of(prefill_chunk=256)
    assert run(line, beginning(0, 40, 5), beginning(1, 40, 5)) == {0: 0, 1: 32}
    prefills = [step for step in line.steps if step.mode == "prefill"]
    assert [len(step.segments) for step in prefills] == [1, 1]


def test_choices_of_one_prompt_share_it() -> None:
    line = line_of()
    choices = [
        beginning(number, 100, 0, sampling=msgspec.structs.replace(GREEDY, choice=number)) for number in range(4)
    ]
    assert run(line, *choices) == {0: 0, 1: 96, 2: 96, 3: 96}


@pytest.mark.parametrize("other", [{"cache_salt": "theirs"}, {"sampling": SCORED}])
def test_another_salt_and_scored_prompts_find_nothing(other: dict[str, Any]) -> None:
    line = line_of()
    run(line, beginning(0, 100, 0))
    line.scheduler.add_request(beginning(1, 100, 0, **other))
    cached = [output.cached_tokens for _ in range(20) if line.submit() or line.results for output in line.deliver()]
    assert set(cached) == {0}
    assert line.stage.computed == 200


def test_without_prefix_caching_nothing_is_found_and_no_key_is_made() -> None:
    line = FakeLine(scheduler_options(stages=1, slots=4, enable_prefix_caching=False))
    assert run(line, beginning(0, 100, 0)) | run(line, beginning(1, 100, 0)) == {0: 0, 1: 0}
    assert not any(segment.keys for step in line.steps for segment in step.segments)
    assert line.scheduler.cache.findable == 0


def test_an_aborted_prefill_leaves_nothing_findable() -> None:
    line = line_of(prefill_chunk=64)
    line.scheduler.add_request(beginning(0, 300, 0))
    for _ in range(2):
        assert line.submit()
        line.deliver()
    assert line.scheduler.cache.findable == 4
    line.scheduler.abort(0)
    assert line.scheduler.cache.findable == 0
    assert run(line, beginning(1, 300, 0)) == {1: 0}
    [forgotten] = [step.forgotten for step in line.steps if step.forgotten]
    assert len(forgotten) == 4


def test_a_prefill_whose_step_fails_or_whose_epoch_ends_leaves_nothing_findable() -> None:
    line = line_of(prefill_chunk=64)
    line.scheduler.add_request(beginning(0, 60, 0))
    step = line.submit()
    assert step is not None
    line.results.clear()
    assert line.scheduler.on_failure(step.step_id, PipelineError("a stage failed")) == []
    line.stage.begin_epoch(lost=False)
    line.scheduler.reset(1)
    line.scheduler.abort(0)
    assert line.scheduler.cache.findable == 0
    assert run(line, beginning(1, 60, 0)) == {1: 0}


def test_what_gave_no_numbers_is_not_found_again_by_anybody() -> None:
    line = line_of(has_tier=True)
    run(line, beginning(0, 70, 0))
    line.scheduler.cache.know_tiers(set(line.stage.tier or ()))
    line.scheduler.add_request(beginning(1, 70, 0))
    assert line.submit()
    line.results[0] = msgspec.structs.replace(line.results[0], tokens=[NO_TOKEN])
    [output] = line.deliver()
    assert output.finish_reason == "error"
    assert run(line, beginning(2, 70, 0)) == {2: 0}


def test_blocks_that_left_the_device_come_back_from_a_tier() -> None:
    line = line_of(has_tier=True, blocks=16)
    prompts = [[number] * 320 for number in range(4)]
    for number, prompt in enumerate(prompts):
        run(line, request(number, prompt, 1))
    line.scheduler.cache.know_tiers(set(line.stage.tier or ()))
    before = line.stage.computed
    for number, prompt in enumerate(prompts, 4):
        assert run(line, request(number, prompt, 1)) == {number: 288}
    assert line.stage.computed - before == 4 * 32
    assert sum(step.mode == "load" for step in line.steps) == 4


def test_what_left_the_device_a_moment_ago_is_believed_to_be_in_a_tier() -> None:
    line = line_of(has_tier=True, blocks=16)
    line.scheduler.cache.know_tiers(frozenset())
    prompts = [[number] * 320 for number in range(2)]
    for number, prompt in enumerate(prompts):
        run(line, request(number, prompt, 1))
    assert run(line, request(2, prompts[0], 1)) == {2: 288}
    assert any(step.loads for step in line.steps)


def test_what_a_tier_has_lost_meanwhile_is_computed() -> None:
    line = line_of(has_tier=True, blocks=16)
    run(line, request(0, [1] * 320, 1))
    run(line, request(1, [2] * 320, 1))
    tier = line.stage.tier
    assert tier is not None
    line.scheduler.cache.know_tiers(set(tier))
    del tier[list(tier)[7]]
    assert run(line, request(2, [1] * 320, 1)) == {2: 224}


@pytest.mark.parametrize("lost", [False, True])
def test_after_a_loss_at_most_a_block_of_each_request_is_computed_again(lost: bool) -> None:
    line = line_of(has_tier=True, slots=10, blocks=200)
    requests = [beginning(number, 0, 150 + number, max_tokens=60) for number in range(10)]
    answers: dict[int, list[int]] = {added.request_id: [] for added in requests}
    for added in requests:
        line.scheduler.add_request(added)
    epoch, results = 0, 0
    while True:
        while line.submit():
            pass
        if not line.results:
            break
        for output in line.deliver():
            answers[output.request_id] += output.tokens
        results += 1
        if results in {80, 117, 150}:
            epoch += 1
            line.results.clear()
            line.stage.begin_epoch(lost=lost)
            line.scheduler.reset(epoch)
            running = sum(0 < len(tokens) < 60 for tokens in answers.values())
            assert running == 10
            assert line.scheduler.tallies.recomputed_tokens <= BLOCK * 10 * (epoch - 1)
    assert epoch == 3
    assert 0 < line.scheduler.tallies.recomputed_tokens <= BLOCK * 10 * 3
    for added in requests:
        assert answers[added.request_id] == reference_answer(added.tokens, 60, [])[0]


def test_a_load_that_fails_is_not_tried_again() -> None:
    line = line_of(has_tier=True)
    run(line, beginning(0, 100, 0))
    line.scheduler.cache.know_tiers(set(line.stage.tier or ()))
    line.stage.begin_epoch(lost=True)
    line.scheduler.reset(1)
    line.scheduler.add_request(beginning(1, 100, 0))
    step = line.submit()
    assert step is not None
    assert step.mode == "load"
    line.results.clear()
    assert line.scheduler.on_failure(step.step_id, PipelineError("a stage failed")) == []
    line.stage.begin_epoch(lost=True)
    line.scheduler.reset(2)
    before = line.stage.computed
    while line.submit() or line.results:
        if line.results:
            line.deliver()
    assert line.stage.computed - before == 100
    tried = [step for step in line.steps if step.epoch == 2 and step.loads]
    assert all({load.key for load in step.loads} <= set(step.forgotten) for step in tried)


def test_a_request_goes_to_the_pool_of_its_beginning_unless_that_is_much_fuller() -> None:
    line = line_of(stages=1, slots=16, pools=2, blocks=64)
    run(line, beginning(0, 100, 0))
    for number in range(1, 6):
        line.scheduler.add_request(beginning(number, 100, number, max_tokens=300))
    while line.submit():
        line.deliver()
        if len(line.scheduler.snapshot().running) == 5 and all(
            run.has_begun for run in line.scheduler.snapshot().running
        ):
            break
    pools = [run.pool for run in sorted(line.scheduler.snapshot().running, key=lambda run: run.arrival)]
    assert pools == [0, 0, 0, 1, 1]


def test_a_preempted_request_finds_its_own_blocks() -> None:
    line = line_of(stages=1, slots=2, blocks=16, prefill_chunk=256)
    run(line, *(request(number, [number] * 200, 120) for number in range(2)))
    tallies = line.scheduler.tallies
    assert tallies.preemptions >= 1
    assert tallies.recomputed_tokens < 200


def test_a_block_that_another_holds_is_not_shared_behind_one_that_may_not_come() -> None:
    """A load that misses has the request compute what follows, and so write to it."""
    line = line_of(stages=1, slots=4, blocks=10, max_model_len=320, has_tier=True)
    scheduler, tier = line.scheduler, line.stage.tier
    assert tier is not None
    scheduler.cache.know_tiers(frozenset())
    prompt = list(range(64))
    run(line, request(0, prompt, 1))
    scheduler.add_request(request(1, prompt, 200))
    while line.submit():
        line.deliver()
        running = scheduler.snapshot().running
        if running and len(running[0].sequence.tokens) >= 100:
            break
    tokens = list(scheduler.snapshot().running[0].sequence.tokens)
    scheduler.add_request(request(2, [7] * 160, 1))
    ended: set[int] = set()
    while 2 not in ended:
        line.submit()
        ended |= {output.request_id for output in line.deliver() if output.finish_reason}
    tier.clear()
    scheduler.add_request(request(3, tokens[:97], 4))
    answer: list[int] = []
    while len(answer) < 4:
        line.submit()
        answer += [token for output in line.deliver() if output.request_id == 3 for token in output.tokens]
    assert answer == reference_answer(tokens[:97], 4, [])[0]


def test_what_is_to_be_forgotten_is_told_again_where_the_step_that_told_it_was_lost() -> None:
    line = line_of(has_tier=True)
    line.scheduler.add_request(beginning(0, 0, 40, max_tokens=50))
    assert line.submit()
    line.deliver()
    line.scheduler.add_request(beginning(1, 100, 0))
    while line.submit():
        poisoned = line.scheduler.requests_in(line.steps[-1]) if line.steps[-1].mode == "prefill" else []
        if 1 in poisoned:
            line.results[-1] = msgspec.structs.replace(line.results[-1], tokens=[NO_TOKEN])
            break
    while line.results:
        line.deliver()
    told = line.scheduler.next_step()
    assert told is not None
    assert len(told.forgotten) == 3
    line.scheduler.cache.know_tiers(set(line.stage.tier or ()))
    line.stage.begin_epoch(lost=True)
    line.scheduler.reset(1)
    line.scheduler.abort(0)
    assert run(line, beginning(2, 100, 0)) == {2: 0}


def test_what_gave_no_numbers_to_a_request_that_had_left_is_not_found_either() -> None:
    line = line_of(has_tier=True)
    line.scheduler.add_request(beginning(0, 100, 0))
    assert line.submit()
    line.scheduler.abort(0)
    line.results[0] = msgspec.structs.replace(line.results[0], tokens=[NO_TOKEN])
    assert line.deliver() == []
    assert line.scheduler.cache.findable == 0
    assert run(line, beginning(1, 100, 0)) == {1: 0}


def test_a_prompt_under_way_at_a_reset_leaves_nothing_of_before_it() -> None:
    line = line_of(prefill_chunk=128)
    line.scheduler.add_request(beginning(0, 300, 0, max_tokens=1))
    assert line.submit()
    line.deliver()
    line.scheduler.cache.use_secret(new_secret())
    while line.submit() or line.results:
        line.deliver()
    assert line.scheduler.cache.findable == 0
    run(line, beginning(1, 129, 0))
    assert run(line, beginning(2, 300, 0)) == {2: 128}
