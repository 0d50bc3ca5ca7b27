"""The bodies of requests that are accepted, and the messages for those that are refused."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.errors import RequestError
from api.openai.completions import CompletionRequest, parse_completion_request
from api.openai.protocol import MESSAGE_CHARACTERS_MAX
from tests import ROOT

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def parse(**fields: Any) -> CompletionRequest:
    return parse_completion_request(json.dumps({"prompt": "a", **fields}).encode())


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        ([[]], [[]]),
    ],
)
def test_the_four_forms_of_a_prompt(prompt: object, prompts: list[object]) -> None:
    assert parse(prompt=prompt).prompts() == prompts


@pytest.mark.parametrize("prompt", [None, 1, True, {}, ["a", 1], [1, "a"], [True], [1.0], [["a"]], [[1], 2], [[1.5]]])
def test_any_other_prompt_is_refused(prompt: object) -> None:
    with pytest.raises(RequestError, match="prompt must be a string, a list of strings") as caught:
        parse(prompt=prompt)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("field", "accepted", "refused"),
    [
        ("max_tokens", [1, 7, None], [-1, 0, "many", [1]]),
        ("temperature", [0, 0.5, 2, 2.1, 1e300, None], [-0.1, "hot"]),
        ("top_p", [0.1, 1, None], [0, -1, 1.1]),
        ("top_k", [-1, 0, 1, 10, None], [-2, 1.5]),
        ("seed", [0, -(2**63), 2**63 - 1, None], [2**63, 0.5]),
        ("n", [1, 256, None], [0, -1, 257]),
        ("stop", [None, [], "a", list("abcde"), ["a"] * 64], ["", [""], ["a", ""], ["a"] * 65, 1, [1], {}, False]),
        ("stop_token_ids", [None, [], [1, 2]], [[True], ["a"], 1, {}]),
        ("min_p", [0, 0.5, 1, None], [-0.1, 1.1]),
        ("presence_penalty", [-2, 0.5, 2, None], [-2.1, 2.1]),
        ("frequency_penalty", [-2, 0.5, 2, None], [-2.1, 2.1]),
        ("repetition_penalty", [0.1, 1, 5, None], [0, -1]),
        ("min_tokens", [0, 3, None], [-1, 1.5]),
        ("logprobs", [0, 1, 20, -1, None], [-2, 1.5, "many", []]),
        ("prompt_logprobs", [0, 1, 20, -1, None], [-2, 1.5, "many", []]),
        ("logit_bias", [None, {}, {"1": 5, "2": -0.5}], [[], {"a": 1}, {"1": "x"}, {"1": True}, {"1": None}, 1]),
        ("allowed_token_ids", [None, [1, 2]], [[], [True], ["a"], 1, {}]),
        ("bad_words", [None, [], ["a", " b"]], [[""], ["a", 1], "a", 1, {}]),
        ("truncate_prompt_tokens", [-1, 0, 7, None], [-2, 1.5]),
        ("truncation_side", ["left", "right", None], ["up", 1]),
        ("response_format", [{"type": "text"}, {"type": "json_object"}, None], ["text"]),
        ("structured_outputs", [{"regex": "a*"}, None], ["a*"]),
        ("thinking_token_budget", [-1, 0, 5, None], [-2, "all"]),
        ("cache_salt", ["a", "ö" * 1024, None], ["", "a" * 1025, 7, ["a"]]),
        ("return_token_ids", [True, False, None], ["perhaps"]),
        ("return_tokens_as_token_ids", [True, False, None], ["perhaps"]),
        ("spaces_between_special_tokens", [True, False, None], ["perhaps"]),
        ("request_id", ["mine", None], [7]),
        ("stream", [True, False, None], ["perhaps", 3]),
        ("echo", [True, False, None], ["perhaps"]),
        ("ignore_eos", [True, False, None], [[]]),
        ("user", ["me", None], [3]),
        ("stream_options", [None], [{}, {"include_usage": True}, 3]),
        ("best_of", [1, None], [0]),
    ],
)
def test_the_range_of_a_field(field: str, accepted: list[object], refused: list[object]) -> None:
    for value in accepted:
        parse(**{field: value})
    for value in refused:
        with pytest.raises(RequestError) as caught:
            parse(**{field: value})
        assert caught.value.param == field, value


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"1e999"])
def test_numbers_must_be_finite(number: bytes) -> None:
    with pytest.raises(RequestError, match="finite") as caught:
        parse_completion_request(b'{"prompt": "a", "temperature": %s}' % number)
    assert caught.value.param == "temperature"
    with pytest.raises(RequestError, match="numbers by token id") as caught:
        parse_completion_request(b'{"prompt": "a", "logit_bias": {"1": %s}}' % number)
    assert caught.value.param == "logit_bias"


def test_biases_are_cut_to_vllms_range() -> None:
    assert parse(logit_bias={"1": 1e300, "2": -(10**400), "03": 2}).logit_bias == {1: 100.0, 2: -100.0, 3: 2.0}


@pytest.mark.parametrize(
    ("field", "neutral", "other"),
    [
        ("suffix", "", "end"),
        ("best_of", 1, 2),
        ("use_beam_search", False, True),
        ("prompt_embeds", None, "AAAA"),
        ("priority", 0, 1),
        ("logprob_token_ids", None, [1]),
        ("repetition_detection", None, {"max_pattern_size": 2}),
    ],
)
def test_a_field_that_is_not_served_is_refused_unless_it_changes_nothing(
    field: str, neutral: object, other: object
) -> None:
    parse(**{field: neutral})
    with pytest.raises(RequestError, match=f"{field} .*is not served: leave it out") as caught:
        parse(**{field: other})
    assert caught.value.param == field


def test_what_contradicts_itself_is_refused() -> None:
    assert parse(max_tokens=0, echo=True).max_tokens == 0
    assert parse(stream=True, stream_options={"include_usage": True}).stream_options is not None
    with pytest.raises(RequestError, match="prompt is empty"):
        parse(prompt=[])
    with pytest.raises(RequestError, match="more than 4096 completions"):
        parse(prompt=["a"] * 100, n=100)
    with pytest.raises(RequestError, match="prompt_logprobs is not allowed with stream"):
        parse(prompt_logprobs=0, stream=True)


def test_unknown_fields_are_ignored() -> None:
    assert parse(wanted="unknown", temperatur=17) == parse()


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff", b'{"prompt": "\\ud800"}', b"[" * 10000, b"{}"])
def test_a_body_that_is_no_request_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError):
        parse_completion_request(body)


def test_every_field_is_in_the_docs() -> None:
    docs = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert [field for field in CompletionRequest.model_fields if f"`{field}`" not in docs] == []


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([*CompletionRequest.model_fields, "x" * 1000]), JSON, max_size=6))
def test_whatever_comes_the_answer_is_a_request_or_one_bounded_sentence(fields: dict[str, object]) -> None:
    message = ""
    try:
        parse_completion_request(json.dumps(fields).encode())
    except RequestError as error:
        message = str(error)
    assert len(message) <= MESSAGE_CHARACTERS_MAX


def test_messages_do_not_grow_with_the_request() -> None:
    for fields in (
        {"prompt": ["a", 1] * 50000},
        {"stop_token_ids": ["x" * 1000] * 1000},
        {"model": ["y" * 100000]},
        {"logit_bias": {f"{'z' * 100}{number}": 1 for number in range(1000)}},
        {"bad_words": [1] * 100000},
    ):
        with pytest.raises(RequestError) as caught:
            parse(**fields)
        assert len(str(caught.value)) <= MESSAGE_CHARACTERS_MAX
