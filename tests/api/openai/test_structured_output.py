"""Fields that say what an answer has to be: the grammars that they stand for, and what is refused of them."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from api.errors import RequestError
from api.openai.grammars.json_schema import DEPTH_MAX, SCHEMA_BYTES_MAX
from api.openai.grammars.structured_output import requested_grammar, schema_grammar
from stages.sampling.grammar import compile_grammar
from tests.support.grammar_answers import TOKENS


def structured(**fields: Any) -> str:
    requested = requested_grammar(structured_outputs=fields)
    assert requested is not None
    assert requested.param == "structured_outputs"
    return requested.grammar.source


def formatted(**fields: Any) -> str:
    requested = requested_grammar(response_format=fields)
    assert requested is not None
    return requested.grammar.source


def accepts(source: str, text: str) -> bool:
    matcher: LLMatcher = compile_grammar(TOKENS, source).deep_copy()
    tokens = TOKENS.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "size": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
CITY = '{"city": "Łódź", "size": 3}'
TAG = {
    "type": "structural_tag",
    "structures": [{"begin": "<f=a>", "schema": SCHEMA, "end": "</f>"}, {"begin": "<f=b>", "schema": {"type": "null"}}],
    "triggers": ["<f="],
}


@pytest.mark.parametrize(
    ("source", "accepted", "refused"),
    [
        (structured(json=SCHEMA), [CITY, '{"city":""}', '{\n  "city": "a"\n}'], ["{}", CITY + " ", '{"city":   "a"}']),
        (structured(json=json.dumps(SCHEMA)), [CITY], ["{}"]),
        (structured(json=SCHEMA, disable_any_whitespace=True), ['{"city":"a"}'], [CITY]),
        (structured(json=SCHEMA, whitespace_pattern="[ ]{1,3}"), ['{"city":   "a"}'], ['{\n"city":"a"}']),
        (structured(json_object=True), ["{}", CITY], ["[]", "3", "{"]),
        (structured(regex=r"^[a-c]{2}/\d+$"), ["ab/7", "cc/123"], ["ab", "abc/1", "ab/٣"]),
        (
            structured(choice=["yes", "", 'n"o\\\n\x7f', "yes, but"]),
            ["yes", "", 'n"o\\\n\x7f', "yes, but"],
            ["y", "no"],
        ),
        (structured(grammar='root ::= "a" | "b" root'), ["a", "bba"], ["b", ""]),
        (structured(grammar='start: "a" B\nB: /[0-9]+/'), ["a12"], ["a"]),
        (
            structured(structural_tag=TAG),
            ["any text", 'so <f=a>{"city": "x"}</f> and <f=b>null!', ""],
            ["<f=c>", "<f=a>{}</f>", "x <f=b>1"],
        ),
        (formatted(**TAG), ["free <f=b>null"], ["<f=b>3"]),
        (formatted(type="json_object"), ["{}"], ["1"]),
        (formatted(type="json_schema", json_schema={"name": "x", "schema": SCHEMA, "strict": True}), [CITY], ["{}"]),
    ],
)
def test_a_field_stands_for_a_grammar(source: str, accepted: list[str], refused: list[str]) -> None:
    assert [text for text in accepted if not accepts(source, text)] == []
    assert [text for text in refused if accepts(source, text)] == []


@settings(deadline=None, max_examples=100)
@given(st.lists(st.text(max_size=8), min_size=1, max_size=4))
def test_every_choice_is_accepted_whatever_is_in_it(choices: list[str]) -> None:
    """Texts of any characters but halves of surrogate pairs, which hypothesis leaves out too."""
    source = structured(choice=choices)
    assert all(accepts(source, text) for text in choices)


def test_older_fields_stand_for_the_same() -> None:
    for kind, value in {"json": SCHEMA, "regex": "a+", "choice": ["a"], "grammar": 'start: "a"'}.items():
        requested = requested_grammar(guided={"guided_json": None, f"guided_{kind}": value})
        assert requested is not None
        assert requested.param == f"guided_{kind}"
        assert requested.grammar.source == structured(**{kind: value})


def test_what_leaves_the_answer_free_is_no_grammar() -> None:
    assert requested_grammar() is None
    assert requested_grammar({"type": "text"}, None, {"guided_regex": None}) is None


def test_what_says_the_same_is_one_grammar() -> None:
    """What only describes is left out, so that it is compiled once."""
    described = {**SCHEMA, "title": "A city", "description": "…", "x-order": 3, "uniqueItems": False}
    assert structured(json=described) == structured(json=SCHEMA)
    assert "x-guidance" in structured(json={**SCHEMA, "x-guidance": {"lenient": True}})
    assert "lenient" not in structured(json={**SCHEMA, "x-guidance": {"lenient": True}})


def nested(depth: int) -> Any:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (structured, "exactly one of json, .*, not 0"),
        (lambda: structured(json=SCHEMA, regex="a"), "exactly one of .*, not 2"),
        (lambda: structured(wish="a"), "'wish', which is not served"),
        (lambda: structured(json=3), "an object, or true or false"),
        (lambda: structured(json="{"), "that is JSON"),
        (lambda: structured(json=False), "allows nothing"),
        (lambda: structured(choice=[]), "a list of strings"),
        (lambda: structured(choice=[1]), "a list of strings"),
        (lambda: structured(choice=["a"] * 20_000), "more than 10000"),
        (lambda: structured(choice=["\ud800"]), "surrogate"),
        (lambda: structured(regex=7), "regex that is a string"),
        (lambda: structured(regex="a" * (SCHEMA_BYTES_MAX + 1)), "longer than 65536 bytes"),
        (lambda: structured(regex="é" * (SCHEMA_BYTES_MAX // 2 + 1)), "longer than 65536 bytes"),
        (lambda: structured(grammar="root ::= ("), "cannot be read"),
        (lambda: structured(grammar="root ::= " + "(" * 5000), "cannot be read"),
        (lambda: structured(structural_tag={"structures": []}), "structural_tag with"),
        (lambda: structured(structural_tag={**TAG, "triggers": ["<g"]}), "no trigger that '<f=a>'"),
        (lambda: formatted(type="xml"), '"type" is "text"'),
        (lambda: requested_grammar("text"), '"type" is "text"'),
        (lambda: formatted(type="json_schema"), '"json_schema" with a "schema"'),
        (lambda: requested_grammar({"type": "json_object"}, {"regex": "a"}), "both say what the answer"),
        (lambda: structured(json={"properties": {"a/b": {"not": {}}}}), r"'not' at /properties/a~1b/not"),
        (lambda: structured(json={"anyOf": [{}, {"format": "iri"}]}), "'iri' at /anyOf/1/format"),
        (lambda: structured(json={"format": []}), "format"),
        (lambda: structured(json={"$defs": {"x": {"$ref": "http://a/b"}}}), r"another document at /\$defs/x/\$ref"),
        (lambda: structured(json={"uniqueItems": True}), "'uniqueItems' at /uniqueItems"),
        (lambda: structured(json=nested(DEPTH_MAX + 1)), "nested more than 64 deep, at /items/items"),
        (lambda: structured(json=nested(50_000)), "nested more than 64 deep"),
        (lambda: structured(json={"enum": ["x" * 70_000]}), "longer than 65536 bytes"),
        (lambda: structured(json={"description": "x" * 1_000_000}), "longer than 65536 bytes"),
    ],
)
def test_what_is_malformed_or_too_large_is_refused(ask: Callable[[], object], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        ask()
    assert caught.value.param in {"structured_outputs", "response_format"}
    assert len(str(caught.value)) < 800


def test_a_schema_within_the_bounds_is_served() -> None:
    schema_grammar(nested(DEPTH_MAX - 1), "schema")
    deep = schema_grammar({"type": "array", "items": {"$ref": "#"}, "maxItems": 2}, "schema").source
    assert accepts(deep, "[[[], [[]]], []]")
    assert re.search("whitespace", deep)
