"""Log-probabilities and token ids in answers, whole and in chunks, against the numbers that the engine gave."""

import asyncio
import math
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from api.openai.logprobs import TokenTexts
from tests.support.api_client import Events, complete, stream
from tests.support.api_server import MODEL, TEXT, TEXT_TOKENS, TOKENIZER, endless_text
from tests.support.fake_engine import FakeEngine, Script, log_softmax_after
from tests.support.small_tokenizer import BOS, BOS_ID, EOS, EOS_ID

LOWEST = -9999.0
HELLO = TEXT_TOKENS[0]
PROMPT = [BOS_ID, HELLO]
ALL_MODEL = msgspec.structs.replace(MODEL, max_logprobs=-1)


def script(*tokens: int) -> Script:
    return lambda _: tokens


def name(token: int) -> str:
    """A token's text where the characters before it are whole."""
    text = TOKENIZER.decode([token], skip_special_tokens=False)
    return "" if text.endswith("\N{REPLACEMENT CHARACTER}") else text


def expected_top(before: list[int], token: int, count: int) -> dict[str, float]:
    """The `count` best after `before` and `token` itself, by text; of several with one text the best."""
    logprobs = log_softmax_after(before)
    best = sorted(range(len(logprobs)), key=lambda one: (-logprobs[one], one))[:count]
    top: dict[str, float] = {}
    for one in [token, *best]:
        top[name(one)] = max(logprobs[one], LOWEST, top.get(name(one), LOWEST))
    return top


async def only_choice(engine: FakeEngine, model: Any = MODEL, **fields: Any) -> dict[str, Any]:
    [choice] = (await complete(engine, model, **fields))["choices"]
    assert isinstance(choice, dict)
    return choice


@pytest.mark.parametrize("count", [0, 1, 5, 20])
async def test_each_token_comes_with_itself_and_the_best(count: int) -> None:
    choice = await only_choice(FakeEngine(endless_text), logprobs=count, max_tokens=4)
    logprobs = choice["logprobs"]
    assert set(logprobs) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert logprobs["tokens"] == ["hello", " w", "ö", "r"]
    for place, token in enumerate(TEXT_TOKENS[:4]):
        before = [*PROMPT, *TEXT_TOKENS[:place]]
        assert logprobs["token_logprobs"][place] == log_softmax_after(before)[token]
        assert logprobs["top_logprobs"][place] == expected_top(before, token, count)


async def test_the_best_token_is_the_one_whose_value_equals_the_greatest() -> None:
    """lm-eval judges by equality of floats whether an answer is greedy."""
    best = max(range(300), key=log_softmax_after(PROMPT).__getitem__)
    worse = sorted(range(300), key=log_softmax_after(PROMPT).__getitem__)[200]
    for token, is_greedy in ((best, True), (worse, False)):
        logprobs = (await only_choice(FakeEngine(script(token)), logprobs=1, max_tokens=1))["logprobs"]
        assert (logprobs["token_logprobs"][0] == max(logprobs["top_logprobs"][0].values())) is is_greedy


async def test_of_tokens_with_one_text_the_best_is_shown() -> None:
    """Half of the small vocabulary is halves of characters, which have no text by themselves."""
    choice = await only_choice(FakeEngine(script(HELLO)), ALL_MODEL, logprobs=-1, max_tokens=1)
    [top] = choice["logprobs"]["top_logprobs"]
    nameless = [token for token in range(300) if name(token) == ""]
    assert len(nameless) > 100
    logprobs = log_softmax_after(PROMPT)
    assert top[""] == max(logprobs[token] for token in nameless)
    assert top == expected_top(PROMPT, HELLO, 300)


async def test_minus_infinity_is_vllms_number() -> None:
    logprobs = log_softmax_after(PROMPT)
    impossible = logprobs.index(-math.inf)
    choice = await only_choice(FakeEngine(script(impossible)), logprobs=0, max_tokens=1)
    assert choice["logprobs"]["token_logprobs"] == [LOWEST]
    assert list(choice["logprobs"]["top_logprobs"][0].values()) == [LOWEST]


async def test_an_echo_begins_with_the_prompts_own_log_probabilities() -> None:
    """lm-eval's request has one token after the prompt, and no log-probability of the prompt's first token."""
    prompt = [BOS_ID, *TEXT_TOKENS]
    engine = FakeEngine(script(HELLO))
    choice = await only_choice(engine, prompt=[prompt], echo=True, logprobs=1, max_tokens=1, temperature=0, seed=1234)
    logprobs = choice["logprobs"]
    assert {len(entries) for entries in logprobs.values()} == {len(prompt) + 1}
    assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
    assert logprobs["tokens"][0] == BOS
    assert "".join(logprobs["tokens"][1:]) == choice["text"] == TEXT + "hello"
    for place in range(1, len(prompt) + 1):
        token = [*prompt, HELLO][place]
        assert logprobs["token_logprobs"][place] == log_softmax_after([*prompt, HELLO][:place])[token]
        assert max(logprobs["top_logprobs"][place].values()) == max(log_softmax_after([*prompt, HELLO][:place]))


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_prompt_may_be_scored_with_nothing_generated(streamed: bool) -> None:
    fields = {"prompt": [TEXT_TOKENS], "echo": True, "logprobs": 2, "max_tokens": 0}
    engine = FakeEngine(endless_text)
    if streamed:
        [event, usage_event] = await stream(engine, **fields, stream_options={"include_usage": True})
        [choice], usage = event["choices"], usage_event["usage"]
    else:
        answer = await complete(engine, **fields)
        [choice], usage = answer["choices"], answer["usage"]
    assert engine.streams[0].request.max_tokens == 0
    assert (choice["text"], choice["finish_reason"], usage["completion_tokens"]) == (TEXT, "length", 0)
    assert len(choice["logprobs"]["tokens"]) == len(TEXT_TOKENS)
    assert choice["logprobs"]["token_logprobs"][0] is None
    second = log_softmax_after(TEXT_TOKENS[:1])[TEXT_TOKENS[1]]
    assert choice["logprobs"]["token_logprobs"][1] == second


async def test_the_prompts_log_probabilities_in_vllms_form() -> None:
    choice = await only_choice(
        FakeEngine(script(HELLO)), prompt=[TEXT_TOKENS], prompt_logprobs=2, max_tokens=1, logprobs=5, echo=True
    )
    entries = choice["prompt_logprobs"]
    assert len(entries) == len(TEXT_TOKENS)
    assert entries[0] is None
    for place in range(1, len(TEXT_TOKENS)):
        logprobs = log_softmax_after(TEXT_TOKENS[:place])
        ranked = sorted(range(300), key=lambda one: (-logprobs[one], one))
        wanted = {TEXT_TOKENS[place], *ranked[:2]}
        assert set(entries[place]) == {str(token) for token in wanted}
        for token in wanted:
            entry = entries[place][str(token)]
            assert (entry["logprob"], entry["rank"]) == (logprobs[token], ranked.index(token) + 1)
    assert entries[1][str(TEXT_TOKENS[1])]["decoded_token"] == " w"
    assert "prompt_logprobs" not in await only_choice(FakeEngine(script(HELLO)), max_tokens=1, logprobs=5, echo=True)


async def test_a_prompt_of_one_token_has_nothing_to_score() -> None:
    fields = {"prompt": [[HELLO]], "echo": True, "logprobs": 1, "prompt_logprobs": 1, "max_tokens": 1}
    choice = await only_choice(FakeEngine(script(HELLO)), **fields)
    assert choice["prompt_logprobs"] == [None]
    assert choice["logprobs"]["tokens"] == ["hello", "hello"]
    assert choice["logprobs"]["text_offset"] == [0, 5]


async def test_the_token_that_ends_a_completion_is_scored_and_counted() -> None:
    engine = FakeEngine(script(HELLO, EOS_ID))
    answer = await complete(engine, logprobs=1, return_token_ids=True)
    [choice] = answer["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("hello", "stop", None)
    assert choice["logprobs"]["tokens"] == ["hello", EOS]
    assert choice["logprobs"]["token_logprobs"][1] == log_softmax_after([*PROMPT, HELLO])[EOS_ID]
    assert (choice["token_ids"], answer["usage"]["completion_tokens"]) == ([HELLO, EOS_ID], 2)


async def test_tokens_may_be_named_by_their_ids() -> None:
    fields = {"logprobs": 2, "max_tokens": 1, "echo": True, "return_tokens_as_token_ids": True}
    choice = await only_choice(FakeEngine(script(EOS_ID - 1)), **fields)
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in [*PROMPT, BOS_ID]]
    top = choice["logprobs"]["top_logprobs"][1]
    assert max(top, key=top.__getitem__) == f"token_id:{log_softmax_after([BOS_ID]).index(max(top.values()))}"


async def test_token_ids_come_with_the_text_and_the_prompts_with_the_first_of_it() -> None:
    tokens = TOKENIZER.encode("a€b", add_special_tokens=False)
    fields = {"return_token_ids": True, "max_tokens": len(tokens), "n": 2, "prompt": ["hello", "x"]}
    whole = (await complete(FakeEngine(script(*tokens)), **fields))["choices"]
    assert [choice["token_ids"] for choice in whole] == [tokens] * 4
    assert [choice["prompt_token_ids"] for choice in whole] == [PROMPT] * 2 + [[BOS_ID, *TOKENIZER.encode("x")[1:]]] * 2
    events = await stream(FakeEngine(script(*tokens)), **fields)
    pieces = [event["choices"][0] for event in events if event["choices"][0]["index"] == 2]
    assert [(piece["text"], piece["token_ids"]) for piece in pieces] == [
        ("a", tokens[:1]),
        ("€", tokens[1:-1]),
        ("b", tokens[-1:]),
    ]
    assert [piece.get("prompt_token_ids") for piece in pieces] == [whole[2]["prompt_token_ids"], None, None]
    assert "token_ids" not in (await only_choice(FakeEngine(script(*tokens)), max_tokens=1))


async def test_offsets_point_into_the_text() -> None:
    tokens = TOKENIZER.encode("wörld €", add_special_tokens=False)
    engine = FakeEngine(script(*tokens, EOS_ID))
    choice = await only_choice(engine, prompt=TEXT, echo=True, logprobs=0, max_tokens=100)
    logprobs, text = choice["logprobs"], choice["text"]
    assert text == TEXT + "wörld €"
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if token not in {BOS, EOS}:
            assert text[offset : offset + len(token)] == token
    assert logprobs["text_offset"][-1] == len(text)


@settings(deadline=None)
@given(text=st.text(), data=st.data())
def test_the_texts_of_tokens_add_up_to_the_text(text: str, data: st.DataObject) -> None:
    """A U+FFFD in the text cannot be told from half a character; a token with one may have no text."""
    assume("\N{REPLACEMENT CHARACTER}" not in text)
    texts = TokenTexts(TOKENIZER)
    joined = ""
    for token in TOKENIZER.encode(text, add_special_tokens=False):
        other, own = texts.texts_here([data.draw(st.integers(0, 299)), token])
        assert not other.endswith("\N{REPLACEMENT CHARACTER}")
        joined += own
        texts.advance(token)
    assert joined == text


def test_a_character_is_ended_only_once() -> None:
    begin, end = TOKENIZER.encode("€", add_special_tokens=False)
    texts = TokenTexts(TOKENIZER)
    assert texts.texts_here([begin, end]) == ["", ""]
    texts.advance(begin)
    assert texts.texts_here([begin, end, HELLO]) == ["", "€", "hello"]
    texts.advance(end)
    assert texts.texts_here([begin, end, HELLO]) == ["", "", "hello"]


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_the_chunks_of_a_stream_hold_every_entry_of_one_answer_once(data: st.DataObject) -> None:
    vocabulary = st.sampled_from([EOS_ID, *TEXT_TOKENS, *range(2, 266)])
    tokens = data.draw(st.lists(vocabulary, min_size=1, max_size=20))
    fields: dict[str, Any] = {
        "prompt": [data.draw(st.lists(vocabulary, min_size=1, max_size=8))],
        "max_tokens": data.draw(st.integers(1, len(tokens))),
        "stop": data.draw(st.lists(st.text("helo wörld€", min_size=1, max_size=3), max_size=4)),
        "min_tokens": data.draw(st.sampled_from([0, 1])),
        "include_stop_str_in_output": data.draw(st.booleans()),
        "skip_special_tokens": data.draw(st.booleans()),
        "ignore_eos": data.draw(st.booleans()),
        "echo": data.draw(st.booleans()),
        "logprobs": data.draw(st.sampled_from([0, 2])),
        "return_token_ids": True,
        "n": data.draw(st.integers(1, 2)),
    }

    async def both() -> tuple[dict[str, Any], Events]:
        engine = FakeEngine(lambda request: tokens[request.sampling.choice :] + tokens)
        return await complete(engine, **fields), await stream(engine, **fields)

    answer, events = asyncio.run(both())
    total = 0
    for choice in answer["choices"]:
        pieces = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice["index"]]
        for column in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            streamed = [entry for piece in pieces for entry in piece["logprobs"][column]]
            assert streamed == choice["logprobs"][column]
        assert [token for piece in pieces for token in piece["token_ids"]] == choice["token_ids"]
        assert (pieces[-1]["finish_reason"], pieces[-1]["stop_reason"]) == (
            choice["finish_reason"],
            choice["stop_reason"],
        )
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        echoed = len(fields["prompt"][0]) if fields["echo"] else 0
        assert len(choice["logprobs"]["tokens"]) == echoed + len(choice["token_ids"])
        total += len(choice["token_ids"])
    assert answer["usage"]["completion_tokens"] == total


async def test_a_chunk_has_the_entries_of_the_tokens_whose_text_it_has() -> None:
    """Text that may become a stop string is held back, and half a character too: their entries wait with them."""
    tokens = [token for text in ("hell", "o", "€", "hello", " w", "x") for token in TOKENIZER.encode(text)[1:]]
    events = await stream(FakeEngine(script(*tokens)), max_tokens=len(tokens), logprobs=0, stop=["hello wö"])
    pieces = [event["choices"][0] for event in events]
    assert len(pieces) > 1
    for piece in pieces:
        assert "".join(piece["logprobs"]["tokens"]) == piece["text"]
