"""Drafts at the sampler: verification keeps every request's answer, and a draft is drawn as its token will be."""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from api.openai.grammars.structured_output import schema_grammar
from stages.sampling.constraint import Constraint
from stages.sampling.logprobs import Floats
from stages.sampling.masks_ahead import MaskThread
from stages.sampling.rows import WholeRows
from stages.sampling.sampler import Sampler, sampling_tokens
from stages.step import NO_TOKEN, Mode, SamplingParams, Segment, Step, Thought, TokenLogprobs
from tests.support.grammar_answers import EOS, PROMPT, SIZE, VOCABULARY, Samplers, params, random_logits

SAMPLER = Sampler(SIZE, VOCABULARY)
"""One for all tests, so that compiled grammars and their thread are those of others before."""


def row_of(logits: Floats) -> WholeRows:
    """The logits of one token."""
    return WholeRows(logits[None])


LENGTH = 16
SOON, PATIENT = 0.01, 60.0
"""Seconds that a draft waits for a mask."""
DRAFTS = 4
CITY = schema_grammar(
    {"type": "object", "properties": {"city": {"enum": ["Oslo", "Bergen"]}, "boats": {"type": "integer"}}}, "schema"
)
THOUGHT = Thought(opening=[1], closing=[9], is_open=True, budget=4)

OPTIONS = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.0, 0.7, 1.5]), "seed": st.integers(0, 99)},
    optional={
        "grammar": st.just(CITY),
        "thought": st.just(THOUGHT),
        "top_k": st.just(40),
        "repetition_penalty": st.just(1.6),
        "presence_penalty": st.just(2.0),
        "frequency_penalty": st.just(0.7),
        "min_tokens": st.just(5),
        "stop_token_ids": st.just([20, 21]),
        "bad_words": st.just([[20], [30, 31]]),
        "allowed_token_ids": st.just(list(range(0, 120, 3))),
        "logprobs": st.sampled_from([0, 3]),
    },
)


class Expected:
    """What a request is answered without drafts, each token with its log-probabilities."""

    def __init__(self, sampling: SamplingParams) -> None:
        self.answer: list[int] = []
        self.logprobs: list[TokenLogprobs | None] = []
        samplers = Samplers(SAMPLER)
        samplers.admit(0, sampling)
        while len(self.answer) < LENGTH + DRAFTS and not self.is_over:
            self.answer.append(samplers.step()[0])
            self.logprobs += samplers.logprobs

    @property
    def is_over(self) -> bool:
        """Whether nothing is to follow what there is."""
        return self.answer[-1:] == [EOS] or min(self.answer, default=0) < 0

    def drafts(self, begin: int, count: int, right: int) -> tuple[list[int], int]:
        """Drafts behind the first tokens, with at most so many that are right; returns how many are."""
        coming = self.answer[begin:]
        known = coming[: min(count, right, len(coming) - 1)]
        wrong = [(coming[len(known)] + 1) % SIZE, *coming[len(known) + 1 :]]
        return [*known, *wrong[: count - len(known)]], len(known)


def admitted(
    sampler: Sampler, *samplings: SamplingParams, answer: Sequence[int] = (), decode: Segment | None = None
) -> Step:
    """Admits requests, which have some tokens of their answers, to slots from 0 on."""
    samplers = Samplers(sampler)
    for slot, sampling in enumerate(samplings):
        samplers.admit(slot, sampling, answer)
    segments = [] if decode is None else [decode]
    step = Step(epoch=1, step_id=0, mode="decode", segments=segments, admissions=samplers.take_admissions(), ended=[])
    sampler.apply(sampler.prepare(step))
    return step


@settings(deadline=None, max_examples=60)
@given(
    st.lists(OPTIONS, min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(0, DRAFTS), st.integers(0, DRAFTS)), min_size=1, max_size=5),
)
def test_answers_are_those_without_drafts(some: list[dict[str, Any]], plan: list[tuple[int, int]]) -> None:
    asked = [params(**options) for options in some]
    expected = {slot: Expected(sampling) for slot, sampling in enumerate(asked)}
    samplers = Samplers(SAMPLER)
    for slot, sampling in enumerate(asked):
        samplers.admit(slot, sampling)
    done = dict.fromkeys(expected, 0)
    turn = 0
    while done:
        drafts, right = {}, {}
        for slot, begin in done.items():
            turn += 1
            drafts[slot], right[slot] = expected[slot].drafts(begin, *plan[turn % len(plan)])
        sampled = samplers.verify(drafts)
        assert samplers.accepted == list(right.values())
        logprobs = iter(samplers.logprobs)
        for slot, begin in list(done.items()):
            end = begin + right[slot] + 1
            assert sampled[slot] == expected[slot].answer[begin:end]
            assert [next(logprobs) for _ in sampled[slot]] == expected[slot].logprobs[begin:end]
            done[slot] = end
            if end >= min(LENGTH, len(expected[slot].answer)):
                samplers.end(slot)
                del done[slot]
        assert next(logprobs, None) is None


@settings(deadline=None, max_examples=60)
@given(OPTIONS)
def test_the_first_draft_is_what_the_same_logits_give_as_the_token(options: dict[str, Any]) -> None:
    """With all that the request's tokens ask for; and making it changes nothing."""
    sampling = params(**options)
    expected = Expected(sampling)
    samplers = Samplers(SAMPLER)
    samplers.admit(0, sampling)
    answer = [samplers.step()[0]]
    while answer[-1] >= 0 and answer[-1] != EOS and len(answer) < LENGTH:
        position = len(PROMPT) + len(answer)
        guess = SAMPLER.draft(0, row_of(random_logits(sampling.seed, position).numpy()), 0, position, [], PATIENT)
        other = SAMPLER.draft(0, row_of(random_logits(7 + sampling.seed, position).numpy()), 0, position, [], PATIENT)
        answer += samplers.step().values()
        assert guess == (answer[-1] if answer[-1] >= 0 else None)
        assert other is None or 0 <= other < SIZE
    assert answer == expected.answer[: len(answer)]


def test_later_drafts_heed_the_ones_before_as_far_as_their_number_and_bad_words_go() -> None:
    logits = np.zeros(SIZE, dtype=np.float32)
    logits[[30, 31, 32]] = [1.0, 3.0, 2.0]
    admitted(SAMPLER, params(temperature=0.0, bad_words=[[30, 31]]), params(temperature=0.0), answer=[4, 30])
    begin = len(PROMPT) + 2
    assert [SAMPLER.draft(slot, row_of(logits), 0, begin, [], PATIENT) for slot in (0, 1)] == [32, 31]
    assert [SAMPLER.draft(slot, row_of(logits), 0, begin + 1, [5], PATIENT) for slot in (0, 1)] == [31, 31]
    assert [SAMPLER.draft(slot, row_of(logits), 0, begin + 1, [30], PATIENT) for slot in (0, 1)] == [32, 31]
    # None of the answer's first three tokens ends it.
    admitted(SAMPLER, params(temperature=0.0, min_tokens=3, stop_token_ids=[31]), answer=[4])
    assert [SAMPLER.draft(0, row_of(logits), 0, begin + more, [5] * (1 + more), PATIENT) for more in (0, 1)] == [32, 31]


def test_no_draft_of_what_is_not_a_number() -> None:
    admitted(SAMPLER, params())
    logits = random_logits(0, 0).numpy()
    logits[9] = np.nan
    assert SAMPLER.draft(0, row_of(logits), 0, len(PROMPT), [], PATIENT) is None


def test_no_draft_while_its_grammar_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other requests do not wait for it, and have theirs."""
    sampler, known = Sampler(SIZE, VOCABULARY), threading.Event()
    usual = MaskThread.constraint

    def slow(thread: MaskThread, sampling: SamplingParams, answer: Sequence[int]) -> Constraint:
        assert known.wait(60)
        return usual(thread, sampling, answer)

    monkeypatch.setattr(MaskThread, "constraint", slow)
    admitted(sampler, params(CITY), params())
    logits = random_logits(0, 0).numpy()
    try:
        assert sampler.draft(0, row_of(logits), 0, len(PROMPT), [], SOON) is None
        assert sampler.draft(1, row_of(logits), 0, len(PROMPT), [], PATIENT) is not None
    finally:
        known.set()
    assert sampler.draft(0, row_of(logits), 0, len(PROMPT), [], PATIENT) is not None
    sampler.close()


def test_no_draft_where_the_grammar_has_failed() -> None:
    samplers = Samplers(SAMPLER)
    samplers.admit(0, params("no grammar at all {"))
    assert samplers.verify({0: [5, 6]})[0][-1] < 0
    assert samplers.accepted == [0]
    assert SAMPLER.draft(0, row_of(random_logits(0, 0).numpy()), 0, len(PROMPT), [], PATIENT) is None


def test_a_draft_is_right_but_what_follows_is_not_a_number() -> None:
    [first, *_] = Expected(params()).answer
    sampler = Sampler(SIZE)
    rows = torch.stack([random_logits(7, len(PROMPT) + place) for place in range(3)])
    rows[1, 4] = torch.nan
    segment = Segment(slot=0, start=len(PROMPT) - 1, tokens=[PROMPT[-1], first, 9], new_blocks=[], sample=True)
    step = admitted(sampler, params(logprobs=1), decode=segment)
    sampled = sampler.sample(step, WholeRows(rows.numpy()))
    assert (sampled.tokens, sampled.accepted) == ([first, NO_TOKEN], [1])
    assert [entry is None for entry in sampled.logprobs] == [False, True]


@pytest.mark.parametrize(("mode", "expected"), [("prefill", [2, 6]), ("decode", [0, 1, 2, 5, 6])])
def test_a_prompt_is_sampled_at_its_last_token_and_a_decode_at_all(mode: Mode, expected: list[int]) -> None:
    segments = [
        Segment(slot=slot, start=0, tokens=[1] * count, new_blocks=[], sample=slot != 1)
        for slot, count in enumerate((3, 2, 2))
    ]
    step = Step(epoch=1, step_id=0, mode=mode, segments=segments, admissions=[], ended=[])
    assert sampling_tokens(step) == expected
