"""Answers read as messages: formats, faults of models and of other servers, and every way to cut a text."""

import itertools
import json
from collections.abc import Iterable
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.openai.answer import AnswerParser
from api.openai.answer_format import (
    CALL,
    CALLS,
    END_CALL,
    END_CALLS,
    END_THINK,
    SEPARATOR,
    THINK,
    TOOL_TAGS,
    AnswerFormat,
)

R1 = AnswerFormat("deepseek_r1", "deepseek_v3")
V31 = AnswerFormat("deepseek_v31", "deepseek_v31")

CITY = '{"city": "Paris"}'


class Message(NamedTuple):
    """What a client puts together from all deltas."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[tuple[str, str], ...] = ()


def read(
    pieces: Iterable[str], answer_format: AnswerFormat = R1, *, in_thought: bool = False, has_tools: bool = True
) -> Message:
    parser = AnswerParser(answer_format, starts_in_thought=in_thought, has_tools=has_tools)
    deltas = [delta for piece in pieces for delta in parser.add(piece)]
    deltas += parser.finish()
    reasoning, content = "", ""
    calls: list[list[str]] = []
    for delta in deltas:
        kinds = [bool(delta.reasoning), bool(delta.content), bool(delta.calls)]
        assert sum(kinds) == 1
        assert not delta.reasoning or not (content or calls)
        reasoning += delta.reasoning
        content += delta.content
        for call in delta.calls:
            if call.index == len(calls):
                assert call.name
                calls.append([call.name, ""])
            else:
                assert call.name is None
                assert call.index == len(calls) - 1
            calls[call.index][1] += call.arguments
    assert parser.calls == len(calls)
    return Message(reasoning, content, tuple((name, arguments) for name, arguments in calls))


def v3_call(name: str, arguments: str, kind: str = "function") -> str:
    return f"{CALL}{kind}{SEPARATOR}{name}\n```json\n{arguments}\n```{END_CALL}"


def v31_call(name: str, arguments: str) -> str:
    return f"{CALL}{name}{SEPARATOR}{arguments}{END_CALL}"


def in_tokens(text: str) -> list[str]:
    """Tags by themselves, everything else character by character."""
    rest, tokens = text, []
    while rest:
        tag = next((tag for tag in (*TOOL_TAGS, THINK, END_THINK) if rest.startswith(tag)), rest[0])
        tokens.append(tag)
        rest = rest[len(tag) :]
    return tokens


@pytest.mark.parametrize(
    ("text", "in_thought", "expected"),
    [
        ("Because.\n</think>\n\nFog.", True, Message("Because.", "Fog.")),
        ("<think>\nBecause.\n</think>\n\nFog.", True, Message("Because.", "Fog.")),
        ("<think>\nBecause.\n</think>\n\nFog.", False, Message("Because.", "Fog.")),
        ("\n<think>Because.</think>Fog.", False, Message("Because.", "Fog.")),
        ("\n\nBecause.\n\n</think>\n\n\nFog.\n", True, Message("\nBecause.\n", "\nFog.\n")),
        ("<think>\n\n</think>\n\nFog.", False, Message("", "Fog.")),
        ("</think>\n\nFog.", True, Message("", "Fog.")),
        ("</think>\n\nFog.", False, Message("", "Fog.")),
        ("Fog, a cloud.", False, Message("", "Fog, a cloud.")),
        ("Half a thought\n", True, Message("Half a thought\n")),
        ("<think>\nHalf a thought </thi", False, Message("Half a thought </thi")),
        ("The tag <think> opens, </think> closes.", False, Message("", "The tag <think> opens, </think> closes.")),
        (" \n", False, Message("", " \n")),
        ("", True, Message()),
    ],
)
def test_r1_thinks_whether_the_prompt_or_the_model_opens_the_thought(
    text: str, in_thought: bool, expected: Message
) -> None:
    assert read(text, in_thought=in_thought) == read([text], in_thought=in_thought) == expected


def test_v31_thinks_where_the_prompt_opens_the_thought_alone() -> None:
    assert read("Because.</think>Fog.", V31, in_thought=True) == Message("Because.", "Fog.")
    assert read("<think>Fog.</think>", V31) == Message("", "<think>Fog.</think>")
    assert read("Because.</think>Fog.", AnswerFormat(), in_thought=True) == Message("", "Because.</think>Fog.")


def test_it_tells_whether_the_model_thinks() -> None:
    parser = AnswerParser(R1, starts_in_thought=False, has_tools=False)
    states = []
    for piece in ["\n", "<think>", "\n", "a", "</think>", "b"]:
        parser.add(piece)
        states.append(parser.is_thinking)
    assert states == [False, True, True, True, False, False]
    parser = AnswerParser(R1, starts_in_thought=True, has_tools=False)
    states = [parser.is_thinking]
    parser.add("</think>")
    assert [*states, parser.is_thinking] == [True, False]
    assert not AnswerParser(AnswerFormat(), starts_in_thought=True, has_tools=False).is_thinking


@pytest.mark.parametrize("pieces", [in_tokens, list, lambda text: [text]])
def test_calls_of_v3_lose_their_fence_however_it_is_cut(pieces: Any) -> None:
    text = f"I ask.{CALLS}{v3_call('get_weather', CITY)}\n{v3_call('get_time', '{}')}{END_CALLS}"
    expected = Message("", "I ask.", (("get_weather", CITY), ("get_time", "{}")))
    assert read(pieces(text)) == expected
    # As tokens come: the fence, the word and the newline by themselves.
    parts = [CALLS, CALL, "function", SEPARATOR, "f", "\n", "```", "json", "\n", "{", "}", "\n", "```", END_CALL]
    assert read(parts) == Message(calls=(("f", "{}"),))


@pytest.mark.parametrize("pieces", [in_tokens, list, lambda text: [text]])
def test_calls_of_v31_have_neither_fence_nor_type(pieces: Any) -> None:
    text = f"Thus.</think>I ask.{CALLS}{v31_call('get_weather', CITY)}{v31_call('function', '{}')}{END_CALLS}"
    expected = Message("Thus.", "I ask.", (("get_weather", CITY), ("function", "{}")))
    assert read(pieces(text), V31, in_thought=True) == expected


@pytest.mark.parametrize(
    ("answer_format", "call"),
    [
        (R1, f"{CALL}get_weather{SEPARATOR}{CITY}{END_CALL}"),
        (R1, f"{CALL}get_weather{SEPARATOR}```json\n{CITY}\n```{END_CALL}"),
        (R1, f"{CALL}tool{SEPARATOR}get_weather\n{CITY}{END_CALL}"),
        (R1, f"{CALL}function{SEPARATOR}get_weather\n```\n{CITY}```{END_CALL}"),
        (R1, f"{CALL}function{SEPARATOR} get_weather ```json{CITY}{END_CALL}"),
        (R1, f"{CALL}function{SEPARATOR}get_weather\njson\n{CITY}{END_CALL}"),
        (V31, f"{CALL}get_weather{SEPARATOR}\n{CITY}\n{END_CALL}"),
        (V31, f"{CALL}function{SEPARATOR}get_weather\n```json\n{CITY}\n```{END_CALL}"),
    ],
)
def test_slips_that_leave_no_doubt_are_calls(answer_format: AnswerFormat, call: str) -> None:
    expected = Message(calls=(("get_weather", CITY),))
    assert read([CALLS, call, END_CALLS], answer_format) == expected
    assert read(call, answer_format) == expected


def test_arguments_are_streamed_and_the_first_delta_has_the_name() -> None:
    parser = AnswerParser(R1, starts_in_thought=False, has_tools=True)
    text = f"{CALLS}{v3_call('get_weather', CITY)}"
    deltas = [(place, delta) for place, piece in enumerate(text) for delta in parser.add(piece)]
    assert [call.name for _, delta in deltas for call in delta.calls] == ["get_weather", *[None] * (len(CITY) - 1)]
    assert [place for place, _ in deltas] == list(range(text.index("{"), text.index("{") + len(CITY)))


@pytest.mark.parametrize(
    "arguments",
    [
        '{"a": 1}',
        '{"a": [{"b": "}"}, null ] }',
        '{"text": "' + END_CALL + END_CALLS + CALLS + '</think>"}',
        json.dumps({"code": '```json\n{"a": 1}\n```', "path": "C:\\"}),
        '{"a": "\\\\\\"}"}',
        "{ }",
    ],
)
def test_arguments_end_with_their_object(arguments: str) -> None:
    expected = Message(calls=(("f", arguments), ("g", "{}")))
    for answer_format, call in ((R1, v3_call), (V31, v31_call)):
        text = f"{CALLS}{call('f', arguments)}{call('g', '{}')}{END_CALLS}"
        assert read(text, answer_format) == read([text], answer_format) == expected


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (f"{CALLS}{v3_call('f', '[1]')}{END_CALLS}", "function f\n```json\n[1]\n```"),
        (f"{CALLS}{v3_call('', CITY)}{END_CALLS}", f"function \n```json\n{CITY}\n```"),
        (f"{CALLS}{v3_call('no name', CITY)}{END_CALLS}", f"function no name\n```json\n{CITY}\n```"),
        (f"{CALLS}{CALL}f {CITY}{END_CALL}{END_CALLS}", f"f {CITY}"),
        (f"{CALLS}{v31_call('f', 'null')}{END_CALLS}", "f null"),
        (f"{CALLS}{CALL}function{SEPARATOR}f\n```js", "function f\n```js"),
        (f"{CALLS}f({CITY}){END_CALLS}", f"f({CITY})"),
        (f"{CALLS}{CALL}f{SEPARATOR}g{SEPARATOR}{CITY}{END_CALL}{END_CALLS}", f"f g {CITY}"),
        (f"{CALLS}{CALL}{'long ' * 200}{SEPARATOR}{CITY}{END_CALLS}", f"{'long ' * 200} {CITY}"),
        (f"{CALLS}{CALL}function{SEPARATOR}{'long' * 200}{CITY}{END_CALLS}", f"function {'long' * 200}{CITY}"),
        (f"Look: {CALLS}{END_CALLS}", "Look: "),
    ],
)
def test_malformed_calls_are_given_back_as_content(text: str, content: str) -> None:
    assert read(text) == read([text]) == Message("", content)


def test_a_malformed_call_does_not_take_others_with_it() -> None:
    text = f"{CALLS}{v3_call('f', CITY)}\n{v3_call('g', '1')}\n{v3_call('h', CITY)}{END_CALLS}"
    assert read(text) == Message("", "function g\n```json\n1\n```", (("f", CITY), ("h", CITY)))


def test_what_breaks_inside_arguments_stays_there() -> None:
    text = f'{CALLS}{CALL}f{SEPARATOR}{{"a": [1{END_CALL}{v31_call("g", "{}")}{END_CALLS}'
    assert read(text, V31) == Message(calls=(("f", '{"a": [1'), ("g", "{}")))
    assert read(f"{CALL}f{SEPARATOR}{{a}}}}{END_CALL}", V31) == Message("", "}", (("f", "{a}"),))
    assert read(f"{CALL}f{SEPARATOR}{{ {SEPARATOR}1{CALL}", V31) == Message("", "", (("f", "{ 1"),))


@pytest.mark.parametrize("kept", range(len(CITY)))
def test_a_call_cut_by_its_length_keeps_what_was_written(kept: int) -> None:
    text = f"{CALLS}{CALL}function{SEPARATOR}get_weather\n```json\n{CITY[: kept + 1]}"
    assert read(text) == Message(calls=(("get_weather", CITY[: kept + 1]),))


def test_text_between_and_behind_calls_is_content() -> None:
    text = f"One. {CALLS}{v3_call('f', '{}')}\nTwo.\n{v3_call('g', '{}')}\n{END_CALLS}\n\nThree.\n"
    assert read(text) == Message("", "One. \nTwo.\n\nThree.", (("f", "{}"), ("g", "{}")))
    text = f"{CALL}f{SEPARATOR}{{}}\n```\nNo fence, a text.{END_CALL}"
    assert read(text) == Message("", "\nNo fence, a text.", (("f", "{}"),))


def test_a_call_inside_a_thought_ends_it() -> None:
    text = f"I should ask.\n{CALLS}{v3_call('f', CITY)}{END_CALLS}"
    assert read(text, in_thought=True) == Message("I should ask.", "", (("f", CITY),))
    late = f"{text}\n</think>\n\nFog. </think>"
    assert read(late, in_thought=True) == Message("I should ask.", "\n\n\nFog. </think>", (("f", CITY),))
    late = f'<think>Ask.{CALL}f{SEPARATOR}{{"</think>": 1}}</think> ok'
    assert read(late) == Message("Ask.", " ok", (("f", '{"</think>": 1}'),))


def test_without_tools_their_tags_are_left_out() -> None:
    text = f"Thus {CALLS}\n</think>\n\nI ask.\n{CALLS}{v3_call('f', CITY)}{END_CALLS}"
    expected = Message("Thus ", f"I ask.\nfunction f\n```json\n{CITY}\n```")
    assert read(text, in_thought=True, has_tools=False) == expected
    other = AnswerFormat("deepseek_r1", "none")
    assert read(text, other, in_thought=True) == Message(f"Thus {CALLS}", text.partition("\n\n")[2])


def test_results_that_a_model_makes_up_show_no_tags() -> None:
    text = (
        f"{CALLS}{v3_call('f', '{}')}{END_CALLS}<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>7<｜tool▁output▁end｜>"
    )
    assert read(text) == Message("", "7", (("f", "{}"),))


FRAGMENTS = st.one_of(
    st.sampled_from(
        [
            *TOOL_TAGS[:5],
            *TOOL_TAGS[:5],
            THINK,
            END_THINK,
            END_THINK,
            "function",
            "get",
            "\n",
            "\n\n",
            " ",
            "```json\n",
            "\n```",
            "`",
            "{",
            "}",
            '{"a": "',
            '"',
            "\\",
            "[",
            "]",
            "<",
            "<｜tool▁ca",
            "<｜tool▁call▁",
            "</th",
            "<thin",
            "k>",
            "雾",
            "🌫️",
        ]
    ),
    st.sampled_from(
        [
            f"{CALLS}{v3_call('get', CITY)}",
            v3_call("get", '{"a": {"b": "\\"}```"}}'),
            v31_call("get", CITY),
            f"{CALL}function{SEPARATOR}get\n```json\n{{",
            f"{END_THINK}\n\n",
        ]
    ),
    st.text(max_size=5),
)
ANSWERS = st.lists(FRAGMENTS, max_size=14).map("".join)
FORMATS = st.builds(
    AnswerFormat,
    st.sampled_from(["deepseek_r1", "deepseek_r1", "deepseek_v31", "none"]),
    st.sampled_from(["deepseek_v3", "deepseek_v31", "none"]),
)


@settings(deadline=None)
@given(text=ANSWERS, answer_format=FORMATS, in_thought=st.booleans(), has_tools=st.booleans(), data=st.data())
def test_every_cut_gives_the_same_message(
    text: str, answer_format: AnswerFormat, in_thought: bool, has_tools: bool, data: st.DataObject
) -> None:
    places = data.draw(st.lists(st.integers(0, len(text)), max_size=6)) if text else []
    cuts = sorted({0, *places, len(text)})

    def message(pieces: Iterable[str]) -> Message:
        return read(pieces, answer_format, in_thought=in_thought, has_tools=has_tools)

    whole = message([text])
    assert message(text) == whole
    assert message(text[begin:end] for begin, end in itertools.pairwise(cuts)) == whole
    assert message(in_tokens(text)) == whole
    for place in range(len(text)):
        assert message([text[:place], text[place:]]) == whole


@given(text=ANSWERS, in_thought=st.booleans(), has_tools=st.booleans())
def test_no_text_is_lost_and_none_is_made_up(text: str, in_thought: bool, has_tools: bool) -> None:
    message = read([text], in_thought=in_thought, has_tools=has_tools)
    given = "".join(piece for piece in in_tokens(text))
    for tag in (*TOOL_TAGS, THINK, END_THINK):
        given = given.replace(tag, " ")
    told = message.reasoning + message.content + "".join(itertools.chain(*message.calls))
    for tag in (*TOOL_TAGS, THINK, END_THINK):
        told = told.replace(tag, " ")
    markup = "`json function"
    assert sorted(letter for letter in told if not letter.isspace() and letter not in markup) == sorted(
        letter for letter in given if not letter.isspace() and letter not in markup
    )


NAMES = st.from_regex(r"[a-zA-Z0-9_-]{1,64}", fullmatch=True)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from([*TOOL_TAGS, "```", '"}', "\\", END_THINK]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
CALL_LISTS = st.lists(
    st.tuples(
        NAMES,
        st.builds(
            lambda value, indent, ascii_only: json.dumps(value, indent=indent, ensure_ascii=ascii_only),
            st.dictionaries(st.text(), VALUES, max_size=4),
            st.sampled_from([None, 2]),
            st.booleans(),
        ),
    ),
    max_size=3,
)
PLAIN = st.text(st.characters(exclude_characters="<", exclude_categories=["Cs"]))


@pytest.mark.parametrize(("answer_format", "call"), [(R1, v3_call), (V31, v31_call)])
@settings(deadline=None)
@given(thought=PLAIN, content=PLAIN, calls=CALL_LISTS)
def test_a_message_written_in_the_format_is_read_as_it_was(
    answer_format: AnswerFormat, call: Any, thought: str, content: str, calls: list[tuple[str, str]]
) -> None:
    between = "\n" if answer_format is R1 else ""
    written = between.join(call(name, arguments) for name, arguments in calls)
    text = f"\n{thought}\n</think>\n\n{content}" + (f"{CALLS}{written}{END_CALLS}" if calls else "")
    expected = Message(thought, content, tuple(calls))
    assert read([text], answer_format, in_thought=True) == read(text, answer_format, in_thought=True) == expected


@pytest.mark.timeout(60)
@pytest.mark.parametrize("unit", [" ", "\n", "<", "`", "<｜tool▁call▁", "{", '\\"', SEPARATOR, CALL, END_THINK, "a"])
@pytest.mark.parametrize("before", ["", f"{CALL}f{SEPARATOR}", f"{CALL}f{SEPARATOR}{{}}", f'{CALL}f{SEPARATOR}{{"'])
def test_each_character_costs_a_bounded_number_of_steps(before: str, unit: str) -> None:
    text = before + unit * (20_000 // len(unit))
    assert read(text) == read([text])
