"""Grammars on the sampler: every token is one that the grammar allows, and a request's answer is its own."""

import json
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.openai.grammars.structured_output import lark_grammar, requested_grammar, schema_grammar
from stages.options import VocabularyOptions
from stages.sampling import masks_ahead
from stages.sampling.constraint import Constraint
from stages.sampling.masks_ahead import MaskThread
from stages.sampling.sampler import Sampler
from stages.step import GRAMMAR_FAILED, SamplingParams, Thought
from tests.support.grammar_answers import (
    EOS,
    PROMPT,
    SIZE,
    VOCABULARY,
    Samplers,
    answers,
    params,
    random_logits,
    refused_place,
    text_of,
)
from tests.support.schemas import regexes, schemas

SAMPLER = Sampler(SIZE, VOCABULARY)
"""One for all tests, so that compiled grammars and their thread are those of others before."""

TOO_COMPLEX = json.dumps(
    {"grammars": [{"lark_grammar": "start: x{1,1000000}\nx: y{1,100000}\ny: /[a-z]/ | /[a-z]/ /[a-z]/"}]}
)


def schema_source(schema: Any) -> str:
    return schema_grammar(schema, "schema").source


def regex_source(regex: str) -> str:
    requested = requested_grammar(structured_outputs={"regex": regex})
    assert requested is not None
    return requested.grammar.source


def sources() -> st.SearchStrategy[str]:
    return st.one_of(schemas().map(schema_source), regexes().map(regex_source))


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.7, 1.5]),
        "top_k": st.sampled_from([1, 5]),
        "repetition_penalty": st.just(1.3),
        "frequency_penalty": st.just(0.5),
        "min_tokens": st.just(5),
        "stop_token_ids": st.just([EOS]),
        "bad_words": st.just([[20], [30, 31]]),
        "logit_bias": st.just({EOS: 4.0, 60: -3.0}),
        "allowed_token_ids": st.just(list(range(0, SIZE, 3))),
    },
)


@settings(deadline=None, max_examples=40)
@given(sources(), OPTIONS, st.integers(0, 1000))
def test_every_token_is_one_that_a_fresh_matcher_allows(source: str, options: dict[str, Any], seed: int) -> None:
    [answer] = answers([params(source, seed=seed, **options)], 24, SAMPLER)
    assert GRAMMAR_FAILED not in answer
    assert refused_place(source, answer) is None


@settings(deadline=None, max_examples=30)
@given(st.lists(sources(), min_size=1, max_size=3), OPTIONS, st.integers(1, 20), st.booleans())
def test_an_answer_is_the_same_beside_others_and_after_a_preemption(
    some: list[str], options: dict[str, Any], cut: int, thinks: bool
) -> None:
    thought = Thought(opening=[1], closing=[9], is_open=True, budget=4) if thinks else None
    asked = [
        *(params(source, seed=seed, thought=thought, **options) for seed, source in enumerate(some)),
        params(None, seed=91),
    ]
    alone = [answers([one], 24)[0] for one in asked]
    assert answers(asked, 24, SAMPLER) == alone
    for sampling, answer in zip(asked, alone, strict=True):
        at = min(cut, len(answer) - 1)
        again = Samplers(SAMPLER)
        again.admit(0, sampling, answer[:at])
        assert [again.step()[0] for _ in answer[at:]] == answer[at:]


def test_eos_comes_where_the_answer_may_end_and_nowhere_else() -> None:
    digits = lark_grammar("start: /[0-9]{3}/", "regex").source
    eager = params(digits, logit_bias={EOS: 100.0})
    [answer] = answers([eager], 10, SAMPLER)
    assert text_of(answer) is not None
    assert len(text_of(answer) or "") == 3
    # Where nothing else may follow, EOS comes however unlikely it is, and although min_tokens forbids it.
    late = params(digits, logit_bias={EOS: -100.0}, min_tokens=50, stop_token_ids=[EOS])
    [answer] = answers([late], 10, SAMPLER)
    assert len(text_of(answer) or "") == 3


def test_min_tokens_holds_where_the_grammar_lets_it() -> None:
    letters = lark_grammar("start: /[a-z]*/", "regex").source
    [answer] = answers([params(letters, logit_bias={EOS: 100.0}, min_tokens=6, stop_token_ids=[EOS])], 20, SAMPLER)
    assert len(answer) == 7
    assert answer[-1] == EOS


def test_a_grammar_wins_over_allowed_tokens_and_bad_words() -> None:
    yes = lark_grammar('start: "yes"', "choice").source
    free = answers([params(yes)], 10, SAMPLER)[0]
    bound = params(yes, allowed_token_ids=[900], bad_words=[[token] for token in free])
    assert answers([bound], 10, SAMPLER) == [free]


def test_a_grammar_that_fails_ends_its_request_and_no_other() -> None:
    asked = [params(TOO_COMPLEX, seed=1), params(schema_source({"type": "boolean"}), seed=2), params(None, seed=3)]
    alone = [answers([one], 40, SAMPLER)[0] for one in asked]
    assert alone[0][-1] == GRAMMAR_FAILED
    assert text_of(alone[1]) in {"true", "false"}
    assert answers(asked, 40, SAMPLER) == alone
    broken = params("no grammar at all {")
    assert answers([broken, asked[2]], 40, SAMPLER) == [[GRAMMAR_FAILED], alone[2]]


@pytest.mark.parametrize("vocabulary", [None, VocabularyOptions(tokenizer="/absent", eos_token_ids=[EOS])])
def test_without_a_tokenizer_grammars_fail_and_other_requests_do_not(vocabulary: VocabularyOptions | None) -> None:
    sampler = Sampler(SIZE, vocabulary)
    asked = [params(schema_source({"type": "null"})), params(None, seed=5)]
    [failed, free] = answers(asked, 5, sampler)
    assert failed == [GRAMMAR_FAILED]
    assert free == answers([asked[1]], 5, SAMPLER)[0]


def test_a_mask_that_takes_too_long_ends_its_request_and_the_next_ones_get_another_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sampler, stuck = Sampler(SIZE, VOCABULARY), threading.Event()
    monkeypatch.setattr(masks_ahead, "MASK_SECONDS", 0.2)
    usual = MaskThread.constraint

    def slow(thread: MaskThread, sampling: SamplingParams, answer: Sequence[int]) -> Constraint:
        if sampling.seed == 666:
            stuck.wait(60)
        return usual(thread, sampling, answer)

    monkeypatch.setattr(MaskThread, "constraint", slow)
    source = schema_source({"type": "boolean"})
    try:
        assert answers([params(source, seed=666)], 5, sampler) == [[GRAMMAR_FAILED]]
        monkeypatch.setattr(masks_ahead, "MASK_SECONDS", 30.0)
        assert text_of(answers([params(source)], 5, sampler)[0]) in {"true", "false"}
    finally:
        stuck.set()
        sampler.close()


def test_log_probabilities_are_the_models_own() -> None:
    samplers = Samplers(SAMPLER)
    samplers.admit(0, params(schema_source({"type": "boolean"}), logprobs=2, temperature=0.0))
    [token] = samplers.step().values()
    logits = random_logits(7, len(PROMPT)).numpy().astype(np.float64)
    [entry] = samplers.logprobs
    assert entry is not None
    assert entry.logprob == pytest.approx(logits[token] - np.log(np.exp(logits).sum()))
    assert token not in entry.top_tokens
