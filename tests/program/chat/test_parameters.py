"""The parameters of chat requests against a real server: those of tt-inference-server's conformance suite, and more."""

import asyncio
import math
from typing import Any

import pytest

from tests.support.chats import TOOLS, Chat, said, user

pytestmark = pytest.mark.slow

QUESTION = "Why is the sky blue?"
STORY = "Tell me a long story about the lighthouse keeper."
OPEN = "Write something about the boats on the river."
UNKNOWN = "What lies beyond the harbour of the old keeper?"
"""A question that the model has no answer to."""
RANDOM: dict[str, Any] = {"temperature": 2, "max_tokens": 8}
"""So hot that no two answers are the same, whatever the model knows by heart."""
SENTENCES = (
    "Seven gulls follow the green ferry",
    "We have 42 apples and 7 clocks",
    "300 boats leave the harbour before dawn",
)
"""Most sentences are repeated, but not all: the model loses its place where a word comes twice."""
LONG = 200


async def test_choices_differ_and_the_prompt_counts_once(chat: Chat) -> None:
    one = await chat.answer(OPEN, **RANDOM)
    answer = await chat.answer(OPEN, **RANDOM, n=4, seed=7)
    contents = [choice["message"]["content"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert len(set(contents)) == 4
    assert answer["usage"]["prompt_tokens"] == one["usage"]["prompt_tokens"]
    assert answer["usage"]["completion_tokens"] == sum(len(choice["token_ids"]) for choice in answer["choices"])


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
async def test_an_answer_ends_at_the_most_tokens(chat: Chat, field: str) -> None:
    answers = await asyncio.gather(*(chat.answer(STORY, **{field: count}) for count in (1, 2, 19)))
    assert [answer["usage"]["completion_tokens"] for answer in answers] == [1, 2, 19]
    assert [len(answer["choices"][0]["token_ids"]) for answer in answers] == [1, 2, 19]
    assert {answer["choices"][0]["finish_reason"] for answer in answers} == {"length"}


async def test_the_newer_name_of_the_most_tokens_goes_first(chat: Chat) -> None:
    assert len((await chat.message(STORY, max_tokens=9, max_completion_tokens=5)).tokens) == 5


async def test_stop_strings_end_the_text_before_the_first_of_them(chat: Chat) -> None:
    text = (await chat.message(QUESTION)).content
    early, late = text.split()[2], text.split()[5]
    stops: list[tuple[Any, str]] = [(late, late), ([late, "never said", early], early), (["never said"], "")]
    answers = await asyncio.gather(*(chat.answer(QUESTION, stop=stop) for stop, _ in stops))
    for (_, found), answer in zip(stops, answers, strict=True):
        [choice] = answer["choices"]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", found or None)
        assert choice["message"]["content"] == (text[: text.index(found)] if found else text)
    shown = await chat.message(QUESTION, stop=early, include_stop_str_in_output=True)
    assert shown.content == text[: text.index(early) + len(early)]


async def test_stop_tokens_end_the_answer(chat: Chat) -> None:
    tokens = (await chat.message(QUESTION)).tokens
    end = tokens.index(tokens[6])
    [choice] = (await chat.answer(QUESTION, stop_token_ids=[tokens[6]]))["choices"]
    assert choice["token_ids"] == tokens[: end + 1]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", tokens[6])


async def test_a_seed_gives_its_text_alone_and_among_thirty_two(chat: Chat) -> None:
    fields = [{**RANDOM, "seed": seed} for seed in range(32)]
    alone = [await chat.message(OPEN, **own) for own in fields]
    assert len({message.content for message in alone}) == 32
    assert await asyncio.gather(*(chat.message(OPEN, **own) for own in fields)) == alone
    assert await asyncio.gather(*(chat.message(OPEN, **RANDOM, seed=5) for _ in range(8))) == [alone[5]] * 8


async def test_parameters_that_differ_do_not_mix_in_a_batch(chat: Chat) -> None:
    different: list[dict[str, Any]] = [
        {},
        {"temperature": 0.7, "top_p": 0.5, "seed": 1},
        {"temperature": 2, "top_k": 3, "seed": 1},
        {"temperature": 2, "min_p": 0.2, "seed": 1},
        {"temperature": 1.5, "presence_penalty": 2, "seed": 2},
        {"temperature": 1.5, "frequency_penalty": -2, "seed": 2},
        {"temperature": 1.5, "repetition_penalty": 1.8, "seed": 2},
        {"temperature": 2, "seed": 3, "n": 2},
        {"stop": ["e"], "temperature": 2, "seed": 4},
        {"logit_bias": {"40": 5, "41": -100}, "temperature": 2, "seed": 5},
        {"bad_words": ["the"], "temperature": 1.2, "seed": 6},
        {"ignore_eos": True, "min_tokens": 9, "temperature": 2, "seed": 7},
        {"logprobs": True, "top_logprobs": 4, "temperature": 2, "seed": 8},
        {"reasoning_effort": "high", "temperature": 2, "seed": 9},
        {"tools": TOOLS, "temperature": 2, "seed": 10},
    ]
    fields = [{"max_tokens": 10, **own} for own in different]
    alone = [await chat.messages(OPEN, **own) for own in fields]
    assert await asyncio.gather(*(chat.messages(OPEN, **own) for own in fields)) == alone


async def test_log_probabilities_are_those_of_completions(chat: Chat) -> None:
    fields: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "return_token_ids": True}
    [choice] = (await chat.answer(QUESTION, logprobs=True, top_logprobs=5, **fields))["choices"]
    entries = choice["logprobs"]["content"]
    for entry in entries:
        best = entry["top_logprobs"]
        assert len(best) == 5
        # The chosen token is the best, as the answer is greedy.
        assert {"token": entry["token"], "logprob": entry["logprob"], "bytes": entry["bytes"]} == best[0]
        assert [other["logprob"] for other in best] == sorted((other["logprob"] for other in best), reverse=True)
        assert sum(math.exp(other["logprob"]) for other in best) <= 1 + 1e-4
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == choice["message"]["content"]
    prompt = await chat.post("/tokenize", messages=[user(QUESTION)])
    [plain] = (await chat.post("/v1/completions", prompt=prompt["tokens"], logprobs=5, **fields))["choices"]
    assert plain["token_ids"] == choice["token_ids"]
    assert plain["logprobs"]["tokens"] == [entry["token"] for entry in entries]
    assert plain["logprobs"]["token_logprobs"] == [entry["logprob"] for entry in entries]
    best_of_each = [{other["token"]: other["logprob"] for other in entry["top_logprobs"]} for entry in entries]
    assert plain["logprobs"]["top_logprobs"] == best_of_each


async def test_without_top_log_probabilities_there_are_those_of_the_chosen_tokens_alone(chat: Chat) -> None:
    [one] = (await chat.answer(QUESTION, logprobs=True, max_tokens=8))["choices"]
    [other] = (await chat.answer(QUESTION, logprobs=True, top_logprobs=2, max_tokens=8))["choices"]
    assert [entry["top_logprobs"] for entry in one["logprobs"]["content"]] == [[]] * 8
    chosen = [{**entry, "top_logprobs": []} for entry in other["logprobs"]["content"]]
    assert one["logprobs"]["content"] == chosen


async def test_greedy_answers_are_the_same_every_time_streamed_and_not(chat: Chat) -> None:
    messages = [await chat.message(QUESTION, max_tokens=16) for _ in range(5)]
    for _ in range(5):
        messages += await chat.streamed(QUESTION, max_tokens=16)
    assert messages == messages[:1] * 10
    # At any temperature, the best token alone is the greedy one.
    assert await chat.message(QUESTION, max_tokens=16, temperature=2, top_k=1) == messages[0]


async def test_penalties_change_the_text(chat: Chat) -> None:
    """At a temperature of 0.1, where the seed alone would hardly do it."""
    penalties: list[dict[str, Any]] = [{"presence_penalty": 2}, {"frequency_penalty": 2}, {"repetition_penalty": 1.5}]
    fields: dict[str, Any] = {"temperature": 0.1, "seed": 11, "max_tokens": 160, "ignore_eos": True}
    plain, *penalised = await asyncio.gather(*(chat.message(UNKNOWN, **fields, **one) for one in [{}, *penalties]))
    assert len({message.content for message in [plain, *penalised]}) == 4
    # Greater variety is what penalties are for.
    assert all(len(set(message.tokens)) > len(set(plain.tokens)) for message in penalised)


async def test_ends_that_are_ignored_and_least_tokens(chat: Chat) -> None:
    whole = await chat.message(QUESTION)
    assert whole.finish_reason == "stop"
    count = len(whole.tokens)
    ignored = await chat.message(QUESTION, ignore_eos=True, max_tokens=count + 8)
    assert (len(ignored.tokens), ignored.finish_reason) == (count + 8, "length")
    # The end itself is a token of both.
    assert ignored.tokens[:count] == whole.tokens
    longer = await chat.message(QUESTION, min_tokens=count + 4, max_tokens=count + 40)
    assert len(longer.tokens) >= count + 4
    assert longer.tokens[: count - 1] == whole.tokens[: count - 1]


async def test_biases_forbid_and_force_tokens(chat: Chat) -> None:
    plain = await chat.message(QUESTION, max_tokens=10)
    first, other = plain.tokens[0], plain.tokens[4]
    forbidden = await chat.message(QUESTION, max_tokens=10, logit_bias={str(first): -100})
    assert first not in forbidden.tokens
    forced = await chat.message(QUESTION, max_tokens=10, logit_bias={str(other): 100})
    assert forced.tokens == [other] * 10


async def test_bad_words_are_not_said(chat: Chat) -> None:
    plain = await chat.message(QUESTION, max_tokens=16)
    word = await chat.post("/detokenize", tokens=[plain.tokens[5]])
    without = await chat.message(QUESTION, max_tokens=16, bad_words=[word["prompt"].strip()])
    assert without.tokens[:5] == plain.tokens[:5]
    assert plain.tokens[5] not in without.tokens


@pytest.mark.parametrize("sentence", SENTENCES)
async def test_a_sentence_is_repeated_word_by_word(chat: Chat, sentence: str) -> None:
    wordings = (f"Repeat after me: {sentence}", f"Echo exactly: {sentence}", f'Say "{sentence}"')
    answers = await asyncio.gather(*(chat.message(wording) for wording in wordings))
    assert [(answer.content, answer.finish_reason) for answer in answers] == [(sentence, "stop")] * 3


async def test_a_long_answer_has_two_hundred_tokens_and_an_end(chat: Chat) -> None:
    message = await chat.message(STORY)
    assert message.finish_reason == "stop"
    assert len(message.tokens) >= LONG
    assert len(set(message.content.split())) >= LONG / 4


CONVERSATIONS: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
    ([user(QUESTION)], {}),
    ([{"role": "system", "content": "You are a helpful assistant."}, user(OPEN)], {}),
    ([user("Hello!"), said("Hello."), user("What is fog?")], {"chat_template_kwargs": {"thinking": True}}),
    ([user("What is the weather in Oslo?")], {"tools": TOOLS}),
    ([user(QUESTION), said("Sunlight")], {"continue_final_message": True, "add_generation_prompt": False}),
]


@pytest.mark.parametrize(("conversation", "prompt_fields"), CONVERSATIONS)
async def test_chat_continues_the_prompt_that_tokenize_gives(
    chat: Chat, conversation: list[dict[str, Any]], prompt_fields: dict[str, Any]
) -> None:
    prompt = await chat.post("/tokenize", messages=conversation, **prompt_fields)
    for sampling in ({"temperature": 0, "max_tokens": 8}, {**RANDOM, "seed": 12, "n": 2}):
        answer = await chat.answer(conversation, **prompt_fields, **sampling)
        plain = await chat.post("/v1/completions", prompt=prompt["tokens"], return_token_ids=True, **sampling)
        assert answer["prompt_token_ids"] == prompt["tokens"]
        assert answer["usage"]["prompt_tokens"] == prompt["count"]
        chosen = [choice["token_ids"] for choice in answer["choices"]]
        assert chosen == [choice["token_ids"] for choice in plain["choices"]]


@pytest.mark.parametrize("effort", ["none", "low", "high"])
async def test_streams_of_several_choices_are_the_whole_answers(chat: Chat, effort: str) -> None:
    fields = {**RANDOM, "seed": 13, "n": 3, "reasoning_effort": effort}
    streamed = await chat.streamed(OPEN, **fields)
    assert streamed == await chat.messages(OPEN, **fields)
    assert len({tuple(message.tokens) for message in streamed}) == 3
