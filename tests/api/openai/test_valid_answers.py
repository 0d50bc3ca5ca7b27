"""Answers at temperature 1.5 from random logits are what their schemas and regular expressions describe.

`jsonschema` and Python's `re` say so, which share no code with llguidance.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from jsonschema import Draft202012Validator

from api.openai.grammars.structured_output import requested_grammar, schema_grammar
from stages.sampling.grammar import compile_grammar
from stages.sampling.sampler import Sampler
from stages.step import GRAMMAR_FAILED, Grammar
from tests.support.grammar_answers import SIZE, TOKENS, VOCABULARY, answers, params, text_of
from tests.support.schemas import regexes, schemas

SAMPLER = Sampler(SIZE, VOCABULARY)
MOST_TOKENS = 200
SEEDS = range(4)
SUITE = json.loads(Path(__file__).parents[2].joinpath("support/json_schema_suite.json").read_text())["groups"]


def whole_answers(grammar: Grammar) -> list[str]:
    """The answers to some requests with a grammar that were not cut off."""
    given_answers = answers([params(grammar, seed=seed) for seed in SEEDS], MOST_TOKENS, SAMPLER, bonus=5.0)
    assert not any(GRAMMAR_FAILED in answer for answer in given_answers)
    return [text for answer in given_answers if (text := text_of(answer)) is not None]


def check_schema(schema: Any) -> int:
    texts = whole_answers(schema_grammar(schema, "schema"))
    for text in texts:
        Draft202012Validator(schema).validate(json.loads(text))
    return len(texts)


@pytest.mark.slow
def test_answers_to_schemas_are_valid() -> None:
    whole: list[int] = []

    @settings(deadline=None, max_examples=120, suppress_health_check=list(HealthCheck))
    @given(schemas())
    def check(schema: dict[str, Any]) -> None:
        whole.append(check_schema(schema))

    check()
    assert sum(whole) > 0.8 * len(whole) * len(SEEDS)


@pytest.mark.slow
def test_answers_to_regular_expressions_match() -> None:
    whole: list[int] = []

    @settings(deadline=None, max_examples=120, suppress_health_check=list(HealthCheck))
    @given(regexes())
    def check(regex: str) -> None:
        requested = requested_grammar(structured_outputs={"regex": regex})
        assert requested is not None
        texts = whole_answers(requested.grammar)
        assert [text for text in texts if not re.fullmatch(regex, text)] == []
        whole.append(len(texts))

    check()
    assert sum(whole) > 0.8 * len(whole) * len(SEEDS)


@pytest.mark.slow
@pytest.mark.parametrize("group", SUITE, ids=lambda group: f"{group['keyword']}-{group['description']}")
def test_answers_to_the_schemas_of_the_test_suite_are_valid(group: dict[str, Any]) -> None:
    check_schema(group["schema"])


@pytest.mark.parametrize("group", SUITE, ids=lambda group: f"{group['keyword']}-{group['description']}")
def test_no_instance_that_the_test_suite_calls_invalid_is_accepted(group: dict[str, Any]) -> None:
    compiled = compile_grammar(TOKENS, schema_grammar(group["schema"], "schema").source)
    for instance in group["invalid"]:
        matcher = compiled.deep_copy()
        tokens = TOKENS.tokenize_str(json.dumps(instance, ensure_ascii=False))
        is_whole = matcher.try_consume_tokens(tokens) == len(tokens)
        assert not (is_whole and matcher.is_accepting()), instance
