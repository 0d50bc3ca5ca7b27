"""Grammars of strangers are tried out in a process of their own, in bounded time, whatever they do to it."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from api.errors import RequestError
from api.openai.grammars.structured_output import requested_grammar, schema_grammar
from api.text.grammar_checker import CHECK_SECONDS, GrammarChecker
from stages.options import VocabularyOptions
from tests.support.grammar_answers import VOCABULARY


@pytest.fixture(scope="module")
def checker() -> Iterator[GrammarChecker]:
    opened = GrammarChecker(VOCABULARY)
    yield opened
    opened.close()


def listed(**grammar: Any) -> str:
    return json.dumps({"grammars": [grammar]})


def regex(pattern: str) -> str:
    requested = requested_grammar(structured_outputs={"regex": pattern})
    assert requested is not None
    return requested.grammar.source


def chain(length: int, keyword: str = "items") -> str:
    """A schema whose definitions refer to each other in a row."""
    definitions = {f"d{i}": {keyword: {"$ref": f"#/$defs/d{i + 1}"}} for i in range(length)}
    return schema_grammar({"$defs": {**definitions, f"d{length}": {}}, "$ref": "#/$defs/d0"}, "schema").source


SERVED = {
    "a schema": schema_grammar({"type": "object", "properties": {"a": {"type": "string"}}}, "schema").source,
    "recursion": schema_grammar({"type": "array", "items": {"$ref": "#"}}, "schema").source,
    "ten thousand values": schema_grammar({"enum": list(range(10_000))}, "schema").source,
    "three hundred properties": schema_grammar(
        {"properties": {f"p{i}": {"type": "string"} for i in range(300)}}, "schema"
    ).source,
    "a regex": regex("([a-z]{1,100}[0-9]{1,100}){1,100}"),
}

REFUSED = {
    "nothing but itself": (schema_grammar({"$ref": "#"}, "schema").source, "cannot be served"),
    "a chain of references": (chain(1200), "takes too much memory"),
    "a chain of rules": (
        listed(lark_grammar="start: a0\n" + "\n".join(f'a{i}: "x" a{i + 1}' for i in range(5000)) + '\na5000: "y"'),
        "takes too much memory",
    ),
    "five thousand properties": (
        listed(json_schema={"properties": {f"p{i}": True for i in range(5000)}}),
        "seconds to compile",
    ),
    "a megabyte": (
        listed(json_schema={"properties": {f"p{i}": {"description": "x" * 100} for i in range(10_000)}}),
        "seconds to compile",
    ),
    "multiples": (
        listed(json_schema={"properties": {f"p{i}": {"type": "integer", "multipleOf": 9001 + i} for i in range(60)}}),
        "seconds to compile",
    ),
    "a regex of regexes": (regex("((((a{1,100}b?){1,100}){1,100}){1,100}){1,100}"), "cannot be served"),
    "lookahead": (regex("(?=a)b"), "cannot be served"),
    "no syntax": (listed(lark_grammar="start: ("), "cannot be served"),
    "no grammar": ("{", "cannot be served"),
}


@pytest.mark.parametrize("name", SERVED)
def test_what_can_be_followed_is_served(name: str, checker: GrammarChecker) -> None:
    checker.check(SERVED[name], "response_format")


@pytest.mark.parametrize("name", REFUSED)
def test_what_costs_too_much_is_refused(name: str, checker: GrammarChecker) -> None:
    source, message = REFUSED[name]
    began = time.monotonic()
    with pytest.raises(RequestError, match=f"response_format .*{message}") as caught:
        checker.check(source, "response_format")
    # The bound that requests have, far above the quarter of a second of processor time.
    assert time.monotonic() - began < CHECK_SECONDS
    assert caught.value.param == "response_format"
    assert len(str(caught.value)) < 400
    # The next one is served as if nothing had been.
    checker.check(schema_grammar({"const": name}, "schema").source, "response_format")


def test_several_threads_ask_at_once(checker: GrammarChecker) -> None:
    refused: list[RequestError] = []

    def ask(number: int) -> None:
        checker.check(schema_grammar({"const": number}, "schema").source, "schema")
        try:
            checker.check(listed(lark_grammar=f"start: ({number}"), "schema")
        except RequestError as error:
            refused.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(refused) == 8


def processes() -> set[psutil.Process]:
    return {one for one in psutil.Process().children() if "api.text.grammar_process" in one.cmdline()}


def test_a_process_that_ends_is_started_again() -> None:
    checker = GrammarChecker(VOCABULARY)
    others = processes()
    try:
        checker.check(SERVED["a schema"], "schema")
        [process] = processes() - others
        process.kill()
        checker.check(SERVED["recursion"], "schema")
    finally:
        checker.close()
    assert processes() <= others


def test_a_tokenizer_that_grammars_cannot_use_is_named(tmp_path: Path) -> None:
    checker = GrammarChecker(VocabularyOptions(tokenizer=str(tmp_path), eos_token_ids=[1]))
    try:
        with pytest.raises(RequestError, match=r"not served with this model: .* has neither tokenizer.json"):
            checker.check(SERVED["a schema"], "schema")
    finally:
        checker.close()
