"""What the chaos benchmark counts; .ci/run shows that it runs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.chaos.answers import Answer
from benchmarks.chaos.chats import CHAT_STYLES, conversations
from benchmarks.chaos.faults import FaultRow
from benchmarks.chaos.findings import Findings, Run, losses_of, percentile, recoveries_in, speeds_of
from benchmarks.chaos.leaks import Holdings, slope
from benchmarks.chaos.load import Totals
from benchmarks.chaos.requests import STYLES, Damage, Question, damage, questions
from benchmarks.chaos.stage import FaultyStage, give_order, is_obeyed, order_file, withdraw
from benchmarks.chaos.typed_events import is_failure
from stages.plan import StageSpec
from stages.step import Segment, Step
from tests.support.runners import EchoRunner

TOKENS = st.lists(st.integers(0, 3), max_size=30)
ASKED = conversations(1, 0)[0]
QUESTION = Question(style="greedy", prompt="How many boats?", max_tokens=4, seed=0)


@given(TOKENS, st.integers(0, 30))
def test_a_beginning_is_no_damage_to_an_answer_that_was_left(tokens: list[int], length: int) -> None:
    assert not damage(tokens, tokens[:length], is_whole=False)
    assert damage(tokens, tokens[:length], is_whole=True) == Damage(lost=max(0, len(tokens) - length))


@given(TOKENS, TOKENS)
def test_no_damage_goes_unseen(expected: list[int], got: list[int]) -> None:
    found = damage(expected, got, is_whole=True)
    assert bool(found) == (expected != got)
    assert found.lost - found.repeated == len(expected) - len(got)


@pytest.mark.parametrize(
    ("got", "found"),
    [
        ([1, 2, 3, 5, 6], Damage(lost=1)),
        ([1, 2, 3, 4, 4, 5, 6], Damage(repeated=1)),
        ([1, 2, 9, 4, 5, 6], Damage(changed=1)),
        ([1, 2, 3, 1, 2, 3, 4, 5, 6], Damage(repeated=3)),
    ],
)
def test_damage_is_told_apart(got: list[int], found: Damage) -> None:
    assert damage([1, 2, 3, 4, 5, 6], got, is_whole=True) == found


def test_totals_hold_tokens_and_log_probabilities_against_the_first_answer() -> None:
    totals = Totals()
    reference = Answer([[1, 2, 3, 4]], logprobs=[-1.0, -2.0, -3.0, -4.0], is_whole=True)
    totals.count_answer(QUESTION, reference, Answer([[1, 2, 3, 4]], logprobs=[-1.0, -2.0, -3.0, -4.0], is_whole=True))
    totals.count_answer(QUESTION, reference, Answer([[1, 2]], logprobs=[-1.0, -2.0]))
    assert (totals.requests, totals.aborted, totals.tokens, totals.errors) == (2, 1, 6, [])
    totals.count_answer(QUESTION, reference, Answer([[1, 2, 4]], logprobs=[-1.0, -2.5, -3.0], is_whole=True))
    assert (totals.lost, totals.repeated, totals.changed, len(totals.errors)) == (1, 0, 1, 2)


CHUNKS: list[dict[str, Any]] = [
    {"delta": {"role": "assistant", "content": ""}},
    {"delta": {"reasoning": "Rain", "reasoning_content": "Rain"}, "token_ids": [1]},
    {"delta": {"reasoning": "?", "reasoning_content": "?"}, "token_ids": [2]},
    {"delta": {"content": "I look."}, "token_ids": [3]},
    {"delta": {"tool_calls": [{"index": 0, "function": {"name": "look", "arguments": ""}}]}, "token_ids": [4]},
    {"delta": {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]}, "token_ids": [5]},
    {"delta": {}, "token_ids": [6], "finish_reason": "tool_calls"},
]
MESSAGE: dict[str, Any] = {
    "content": "I look.",
    "reasoning": "Rain?",
    "tool_calls": [{"id": "call_1", "function": {"name": "look", "arguments": "{}"}}],
}
WHOLE = {"message": MESSAGE, "token_ids": [1, 2, 3, 4, 5, 6], "finish_reason": "tool_calls"}


def answer_of(*choices: dict[str, Any], is_whole: bool = True) -> Answer:
    answer = Answer.of(1)
    for choice in choices:
        answer.add({"index": 0, **choice})
    answer.is_whole = is_whole
    return answer


def test_a_message_has_the_same_transcript_streamed_and_whole() -> None:
    whole = answer_of(WHOLE)
    assert answer_of(*CHUNKS) == whole
    assert whole.texts == ["\nreasoning: Rain?\ncontent: I look.\ncall 0: look\narguments 0: {}\nend: tool_calls"]
    totals = Totals()
    for count in range(len(CHUNKS)):
        totals.count_answer(ASKED, whole, answer_of(*CHUNKS[:count], is_whole=False))
    assert (totals.chats, totals.errors) == (len(CHUNKS), [])


@pytest.mark.parametrize("place", range(1, len(CHUNKS)))
def test_a_part_of_a_message_that_is_lost_or_repeated_damages_it(place: int) -> None:
    reference = answer_of(WHOLE)
    for changed in ([*CHUNKS[:place], *CHUNKS[place + 1 :]], [*CHUNKS[: place + 1], *CHUNKS[place:]]):
        # The tokens are as they should be: what came of them is not.
        answer = answer_of(*changed)
        answer.tokens = reference.tokens
        totals = Totals()
        totals.count_answer(ASKED, reference, answer)
        assert (totals.messages, totals.lost + totals.repeated + totals.changed, len(totals.errors)) == (1, 0, 1)


def test_a_change_of_a_message_damages_it() -> None:
    for changed in ({"content": "I look!"}, {"reasoning": "Rain!"}, {"content": "I look.Rain", "reasoning": "?"}):
        answer = answer_of({**WHOLE, "message": {**MESSAGE, **changed}})
        totals = Totals()
        totals.count_answer(ASKED, answer_of(WHOLE), answer)
        assert totals.messages == 1


CALLED = {"type": "tool_use", "id": "call_1", "name": "look"}
TYPED: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
    (
        [
            {"type": "message_start", "message": {"type": "message", "content": [], "stop_reason": None}},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "I "}},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "look."}},
            {"type": "content_block_stop", "index": 0},
            {"type": "content_block_start", "index": 1, "content_block": {**CALLED, "input": {}}},
            {"type": "message_delta", "delta": {"stop_reason": "tool_use"}},
            {"type": "message_stop"},
        ],
        {
            "type": "message",
            "content": [{"type": "text", "text": "I look."}, {**CALLED, "input": {}}],
            "stop_reason": "tool_use",
        },
    ),
    (
        [
            {"type": "response.created", "response": {"object": "response", "output": [], "status": "in_progress"}},
            {"type": "response.output_item.added", "output_index": 0, "item": {"type": "message", "content": []}},
            {"type": "response.output_text.delta", "output_index": 0, "delta": "I "},
            {"type": "response.output_text.delta", "output_index": 0, "delta": "look."},
            {"type": "response.output_text.done", "output_index": 0, "text": "I look."},
            {"type": "response.completed", "response": {"object": "response", "status": "completed"}},
        ],
        {
            "object": "response",
            "error": None,
            "output": [{"type": "message", "content": [{"type": "output_text", "text": "I look."}]}],
            "status": "completed",
        },
    ),
]


@pytest.mark.parametrize(("events", "whole"), TYPED)
def test_typed_events_make_the_transcript_of_the_whole_answer(
    events: list[dict[str, Any]], whole: dict[str, Any]
) -> None:
    streamed, at_once = Answer.of(1), Answer.of(1)
    assert not any(is_failure(event) or streamed.add_event(event) for event in events)
    at_once.add_event(whole)
    assert not is_failure(whole)
    assert streamed.texts == at_once.texts
    assert "I look." in at_once.texts[0]


def test_log_probabilities_of_both_routes_are_read() -> None:
    chat = answer_of({"delta": {"content": "a"}, "logprobs": {"content": [{"logprob": -1.0}]}})
    completion = answer_of({"text": "a", "logprobs": {"token_logprobs": [-1.0]}})
    assert chat == completion


def test_conversations_follow_from_their_seed_and_have_all_styles() -> None:
    assert conversations(24, 1) == conversations(24, 1) != conversations(24, 2)
    assert {question.style for question in conversations(24, 1)} == set(CHAT_STYLES)
    assert {question.is_streamed for question in conversations(24, 1)} == {True, False}
    assert [question.body()["n"] for question in conversations(8, 1) if question.choices == 2] == [2]


def test_questions_follow_from_their_seed_and_have_all_styles() -> None:
    assert questions(12, 1) == questions(12, 1) != questions(12, 2)
    assert {question.style for question in questions(12, 1)} == set(STYLES)
    assert [question.body()["n"] for question in questions(12, 1) if question.style == "two choices"] == [2, 2]


def test_memory_is_measured_from_the_third_minute_on() -> None:
    times = [float(second) for second in range(0, 600, 10)]
    loading = [1000 if second < 120 else 2000 for second in times]
    assert slope(times, loading) == pytest.approx(0)
    growing = [round(2000 * (1 + max(0.0, second - 120) / 60 * 0.02)) for second in times]
    assert slope(times, growing) == pytest.approx(2, rel=0.01)
    assert slope([0.0], [5]) == 0


def test_what_is_held_is_compared_by_name() -> None:
    before = Holdings(counts={"threads x": 3, "files": 2})
    assert Holdings(counts={"threads x": 7, "files": 1, "sockets": 1}).grown(before) == {"sockets": 1}
    assert Holdings(counts={"threads x": 8, "files": 2}).grown(before) == {"threads x": 5}


def test_percentiles_are_values_that_were_there() -> None:
    assert percentile([], 50) == 0
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([float(value) for value in range(100)], 99) == 99.0


def test_the_servers_own_recoveries_are_read_from_its_log(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    back = {"event": "the pipeline is back", "epoch": 2, "seconds": 1.5}
    log.write_text("\n".join(["Ready: x", json.dumps({"event": "loading"}), json.dumps(back), "[1]", ""]))
    assert recoveries_in(log) == [1.5]


def test_every_loss_misses_its_target() -> None:
    run = Run(seconds=60.0, seed=1, clients=2, stages=2, has_faults=True, pause_s=0.0)
    fault = FaultRow(kind="kill", stages=[1], at_s=0.0, recovery_s=2.0)
    summary = Findings(faults=[fault] * 5, draft_tokens=1).summary()
    assert all(target.is_met for target in [*losses_of(run, summary), *speeds_of(run, summary)])
    bad = [
        Findings(faults=[fault] * 4, draft_tokens=1),
        Findings(faults=[fault] * 5),
        Findings(faults=[fault] * 5, draft_tokens=1, failure="It hung."),
        Findings(faults=[fault] * 5, draft_tokens=1, leaks={"threads": 1}),
        Findings(faults=[fault] * 5, draft_tokens=1, slopes={"engine": 1.5}),
        Findings(faults=[FaultRow(kind="hang", stages=[1], at_s=0.0, recovery_s=9.0)] * 5, draft_tokens=1),
        *(Findings(faults=[fault] * 5, draft_tokens=1, totals=totals) for totals in damaged()),
    ]
    for findings in bad:
        targets = [*losses_of(run, findings.summary()), *speeds_of(run, findings.summary())]
        assert len([target for target in targets if not target.is_met]) == 1


def damaged() -> Iterator[Totals]:
    yield Totals(lost=1)
    yield Totals(repeated=1)
    yield Totals(changed=1)
    yield Totals(messages=1)
    yield Totals(errors=["It was 503."])


def test_a_stage_obeys_an_order_once(tmp_path: Path) -> None:
    segment = Segment(slot=0, start=0, tokens=[1], new_blocks=[], sample=True)
    step = Step(epoch=1, step_id=5, mode="decode", segments=[segment], admissions=[], ended=[])
    runner = EchoRunner(StageSpec(index=0, stages=2, first_layer=0, end_layer=1))
    stage = FaultyStage(runner, order_file(tmp_path, 0))
    assert stage.step(step, memoryview(b"")) == runner.step(step, memoryview(b""))
    order = give_order(tmp_path, 0, "raise")
    assert not is_obeyed(order)
    with pytest.raises(Exception, match="the device was told to fail"):
        stage.step(step, memoryview(b""))
    assert is_obeyed(order)
    assert stage.step(step, memoryview(b"")) == runner.step(step, memoryview(b""))
    withdraw(give_order(tmp_path, 0, "hang"))
    assert stage.step(step, memoryview(b"")) == runner.step(step, memoryview(b""))
