"""The sampling parameters that the engine gets for each field of a request."""

from typing import Any

import msgspec
import pytest
from transformers import AutoTokenizer

from api.messages.engine import AddRequest
from api.text.served_model import GenerationConfig
from api.text.tokenizer import TextTokenizer
from stages.step import VOCABULARY, SamplingParams
from tests.support.api_client import complete
from tests.support.api_server import MODEL, TEXT, TEXT_TOKENS, TOKENIZER, endless_text
from tests.support.fake_engine import FakeEngine
from tests.support.small_tokenizer import BOS_ID, EOS_ID
from weights.sample import SAMPLE_DIR

ALL_MODEL = msgspec.structs.replace(MODEL, max_logprobs=-1)


async def told(model: Any = MODEL, **fields: Any) -> list[AddRequest]:
    """Returns the requests that the engine gets."""
    engine = FakeEngine(endless_text)
    await complete(engine, model, **fields)
    return [made.request for made in engine.streams]


@pytest.mark.parametrize(
    ("fields", "option", "value"),
    [
        ({"temperature": 0.5}, "temperature", 0.5),
        ({"top_p": 0.25}, "top_p", 0.25),
        ({"top_k": 7}, "top_k", 7),
        ({"top_k": -1}, "top_k", 0),
        ({"top_k": 10**6}, "top_k", 300),
        ({"min_p": 0.125}, "min_p", 0.125),
        ({"seed": 12}, "seed", 12),
        ({"seed": -5}, "seed", -5),
        ({"presence_penalty": -1.5}, "presence_penalty", -1.5),
        ({"frequency_penalty": 0.75}, "frequency_penalty", 0.75),
        ({"repetition_penalty": 1.25}, "repetition_penalty", 1.25),
        ({"logit_bias": {"7": 3, "9": -1000}}, "logit_bias", {7: 3.0, 9: -100.0}),
        ({"allowed_token_ids": [9, 7, 9]}, "allowed_token_ids", [7, 9]),
        ({"min_tokens": 3}, "min_tokens", 3),
        ({"min_tokens": 3, "stop_token_ids": [7]}, "stop_token_ids", [EOS_ID, 7]),
        ({"min_tokens": 3, "ignore_eos": True}, "stop_token_ids", [EOS_ID]),
        ({"stop_token_ids": [7]}, "stop_token_ids", []),
        ({"logprobs": 0}, "logprobs", 0),
        ({"logprobs": 20}, "logprobs", 20),
        ({"logprobs": 3}, "prompt_logprobs", None),
        ({"prompt_logprobs": 2}, "prompt_logprobs", 2),
        ({"echo": True, "logprobs": 1}, "prompt_logprobs", 1),
        ({"echo": True, "logprobs": 1, "prompt_logprobs": 4}, "prompt_logprobs", 4),
        ({"echo": True, "logprobs": 4, "prompt_logprobs": 0}, "prompt_logprobs", 4),
    ],
)
async def test_what_a_field_tells_the_engine(fields: dict[str, Any], option: str, value: object) -> None:
    [request] = await told(**fields)
    assert getattr(request.sampling, option) == value


async def test_a_request_that_says_nothing_changes_nothing() -> None:
    [request] = await told()
    unchanged = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, seed=request.sampling.seed, choice=0)
    assert request.sampling == unchanged
    assert request.max_tokens == 16
    nulls = dict.fromkeys((*SamplingParams.__struct_fields__[:-1], "max_tokens", "stop", "n", "echo"), None)
    [request] = await told(**nulls)
    assert request.sampling == msgspec.structs.replace(unchanged, seed=request.sampling.seed)


async def test_a_seed_of_minus_one_is_as_good_as_none() -> None:
    seeds = {request.sampling.seed for _ in range(2) for request in await told(seed=-1, prompt=["a", "b"])}
    assert len(seeds) == 4
    assert -1 not in seeds


async def test_all_log_probabilities_may_be_asked_for_where_the_server_has_no_bound() -> None:
    [request] = await told(ALL_MODEL, logprobs=-1, prompt_logprobs=300)
    assert (request.sampling.logprobs, request.sampling.prompt_logprobs) == (VOCABULARY, 300)
    [request] = await told(ALL_MODEL, logprobs=5, prompt_logprobs=-1, echo=True)
    assert (request.sampling.logprobs, request.sampling.prompt_logprobs) == (5, VOCABULARY)


async def test_the_models_advice_stands_where_the_request_is_silent() -> None:
    advice = GenerationConfig(min_p=0.1, repetition_penalty=1.1, max_new_tokens=5)
    model = msgspec.structs.replace(MODEL, generation=advice)
    [request] = await told(model)
    assert (request.sampling.min_p, request.sampling.repetition_penalty, request.max_tokens) == (0.1, 1.1, 5)
    [request] = await told(model, min_p=0, repetition_penalty=1, max_tokens=2)
    assert (request.sampling.min_p, request.sampling.repetition_penalty, request.max_tokens) == (0, 1, 2)


async def test_bad_words_are_given_alone_and_after_a_space_where_that_is_one_token_too() -> None:
    """The sequences follow vLLM's rule, applied to another reader of the same vocabulary."""
    words = ["the", " sea", "San Francisco", "the", "7", "é"]
    model = msgspec.structs.replace(MODEL, vocab_size=1024, tokenizer=TextTokenizer.load(SAMPLE_DIR))
    [request] = await told(model, bad_words=words)
    reference = AutoTokenizer.from_pretrained(SAMPLE_DIR)
    expected: list[list[int]] = []
    for word in dict.fromkeys(words):
        alone, spaced = (reference.encode(prefix + word.lstrip(), add_special_tokens=False) for prefix in ("", " "))
        expected.append(alone)
        if spaced[0] != alone[0] and len(spaced) == len(alone):
            expected.append(spaced)
    assert request.sampling.bad_words == expected
    assert len(expected) > len(set(words))


async def test_the_tokens_that_end_a_request() -> None:
    [request] = await told(stop_token_ids=[7, EOS_ID, 7])
    assert request.stop_token_ids == [EOS_ID, 7]
    [request] = await told(stop_token_ids=[7], ignore_eos=True)
    assert request.stop_token_ids == [7]


@pytest.mark.parametrize("side", ["left", "right", None])
async def test_a_prompt_is_cut_to_as_many_tokens_as_asked(side: str | None) -> None:
    cut = {"truncate_prompt_tokens": 4, "truncation_side": side}
    [text] = await told(prompt=TEXT, **cut)
    [plain] = await told(prompt=TEXT, add_special_tokens=False, **cut)
    [tokens] = await told(prompt=[TEXT_TOKENS], **cut)
    kept = TEXT_TOKENS[:4] if side == "right" else TEXT_TOKENS[-4:]
    assert plain.tokens == tokens.tokens == kept
    assert text.tokens == [BOS_ID, *(TEXT_TOKENS[:3] if side == "right" else TEXT_TOKENS[-3:])]


async def test_a_prompt_may_be_cut_to_what_the_completion_leaves() -> None:
    [request] = await told(prompt=[TEXT_TOKENS * 40], truncate_prompt_tokens=-1, max_tokens=100)
    assert (len(request.tokens), request.max_tokens) == (156, 100)
    [request] = await told(prompt=[TEXT_TOKENS * 40], truncate_prompt_tokens=-1)
    assert (len(request.tokens), request.max_tokens) == (240, 16)
    engine = FakeEngine(endless_text)
    answer = await complete(engine, prompt="wwwhello", truncate_prompt_tokens=2, echo=True, max_tokens=1)
    assert answer["choices"][0]["text"] == "hello" + TOKENIZER.decode(TEXT_TOKENS[:1])


@pytest.mark.parametrize("length", [1, 2, 5, 100])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_the_tokenizer_cuts_as_transformers_does(length: int, side: Any, add_special_tokens: bool) -> None:
    reference = AutoTokenizer.from_pretrained(SAMPLE_DIR, truncation_side=side)
    tokens = reference.encode(TEXT, truncation=True, max_length=length, add_special_tokens=add_special_tokens)
    assert TextTokenizer.load(SAMPLE_DIR).encode_part(TEXT, length, side, add_special_tokens) == tokens
