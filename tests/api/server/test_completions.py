"""The application with an engine whose tokens are known: the engine's requests and the client's answers."""

import asyncio
from collections.abc import MutableMapping
from typing import Any

import msgspec
import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from actors.errors import PlacementError
from actors.stage.health import StageProgress
from api.errors import NotReadyError, RequestError
from api.messages.engine import AddRequest, EngineState, failed_state
from api.text.served_model import GenerationConfig
from tests.support.api_client import Events, client, complete, error_of, post, stream
from tests.support.api_server import MODEL, TEXT, TEXT_TOKENS, TOKENIZER, endless_text
from tests.support.fake_engine import FakeEngine
from tests.support.small_tokenizer import BOS_ID, EOS, EOS_ID, small_tokenizer
from weights.errors import CheckpointError

NOT_CACHED = {"prompt_tokens_details": {"cached_tokens": 0}}


def text_of(count: int) -> str:
    return TOKENIZER.decode((TEXT_TOKENS * 20)[:count])


async def test_a_completion_in_one_answer() -> None:
    engine = FakeEngine(endless_text)
    answer = await complete(engine, model="small", max_tokens=9, user=None)
    assert answer.pop("id").startswith("cmpl-")
    assert answer.pop("created") > 0
    assert answer == {
        "object": "text_completion",
        "model": "small",
        "choices": [{"index": 0, "text": text_of(9), "logprobs": None, "finish_reason": "length", "stop_reason": None}],
        "usage": {"prompt_tokens": 2, "completion_tokens": 9, "total_tokens": 11, **NOT_CACHED},
    }
    [sent] = engine.streams
    assert sent.request.tokens == [BOS_ID, *TEXT_TOKENS[:1]]
    assert sent.request.stop_token_ids == [EOS_ID]
    assert sent.ended


async def test_every_choice_of_a_request_has_its_salt() -> None:
    engine = FakeEngine(endless_text)
    await complete(engine, prompt=["a", "b"], n=2, cache_salt="tenant")
    await complete(engine)
    assert [made.request.cache_salt for made in engine.streams] == ["tenant"] * 4 + [""]


async def test_what_a_request_leaves_open_is_vllms_default() -> None:
    engine = FakeEngine(endless_text)
    await complete(engine)
    request = engine.streams[0].request
    params = request.sampling
    assert (request.max_tokens, params.temperature, params.top_p, params.top_k) == (16, 1.0, 1.0, 0)


async def test_the_request_comes_before_the_models_advice_and_that_before_the_defaults() -> None:
    advice = GenerationConfig(temperature=0.6, top_p=0.95, top_k=20, max_new_tokens=5)
    model = msgspec.structs.replace(MODEL, generation=advice)
    engine = FakeEngine(endless_text)
    await complete(engine, model)
    await complete(engine, model, temperature=0, top_p=0.5, top_k=-1, max_tokens=3, seed=7)
    first, second = (made.request for made in engine.streams)
    params = first.sampling
    assert (first.max_tokens, params.temperature, params.top_p, params.top_k) == (5, 0.6, 0.95, 20)
    params = second.sampling
    assert (second.max_tokens, params.temperature, params.top_p, params.top_k, params.seed) == (3, 0, 0.5, 0, 7)


async def test_seeds_are_drawn_for_each_prompt_and_may_be_fixed_for_the_server() -> None:
    def seeds(engine: FakeEngine) -> list[int]:
        return [made.request.sampling.seed for made in engine.streams]

    engines = [FakeEngine(endless_text) for _ in range(3)]
    for engine, seed in zip(engines, (1, 1, None), strict=True):
        async with client(engine, seed=seed) as opened:
            await opened.post("/v1/completions", json={"prompt": ["a", "b"], "n": 2})
    first, again, free = map(seeds, engines)
    assert first == again != free
    assert first[0] == first[1] != first[2] == first[3]
    assert [made.request.sampling.choice for made in engines[0].streams] == [0, 1, 0, 1]


async def test_choices_are_numbered_prompt_by_prompt() -> None:
    engine = FakeEngine(lambda request: request.tokens[1:] * 9)
    answer = await complete(engine, prompt=["a", "b"], n=2, max_tokens=3)
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (0, "aaa"),
        (1, "aaa"),
        (2, "bbb"),
        (3, "bbb"),
    ]
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 12, "total_tokens": 16, **NOT_CACHED}


@pytest.mark.parametrize("prompt", [[7, 8], [[7, 8]]])
async def test_token_ids_go_to_the_engine_as_they_are(prompt: object) -> None:
    engine = FakeEngine(endless_text)
    await complete(engine, prompt=prompt)
    assert engine.streams[0].request.tokens == [7, 8]


async def test_eos_ends_a_completion_unless_it_is_ignored() -> None:
    engine = FakeEngine(lambda _: [*TEXT_TOKENS[:3], EOS_ID, *TEXT_TOKENS])
    [choice] = (await complete(engine))["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text_of(3), "stop")
    answer = await complete(engine, ignore_eos=True, max_tokens=6)
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == (text_of(3) + text_of(2), "length")
    assert answer["usage"]["completion_tokens"] == 6
    await complete(engine, ignore_eos=True, stop_token_ids=[TEXT_TOKENS[0]])
    assert engine.streams[-1].request.stop_token_ids == [TEXT_TOKENS[0]]


async def test_a_stop_string_ends_the_completion_and_the_work_on_it() -> None:
    engine = FakeEngine(endless_text)
    answer = await complete(engine, stop=["zz", "rld"], max_tokens=200)
    [choice] = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("hello wö", "stop")
    assert answer["usage"]["completion_tokens"] < 10
    assert engine.streams[0].aborted.is_set()
    [choice] = (await complete(engine, stop="rld", include_stop_str_in_output=True, max_tokens=200))["choices"]
    assert choice["text"] == "hello wörld"


async def test_what_a_completion_stopped_at_is_said() -> None:
    """EOS is not a reason of its own, as in vLLM; any other stop token is named, and shown only on request."""
    tokens = [*TEXT_TOKENS[:3], EOS_ID]

    async def stopped(**fields: Any) -> tuple[str, str, object]:
        engine = FakeEngine(lambda _: [*tokens, *TEXT_TOKENS, *TEXT_TOKENS])
        [choice] = (await complete(engine, max_tokens=30, **fields))["choices"]
        [*_, last] = await stream(engine, max_tokens=30, **fields)
        assert [last["choices"][0][name] for name in ("finish_reason", "stop_reason")] == [
            choice["finish_reason"],
            choice["stop_reason"],
        ]
        return choice["text"], choice["finish_reason"], choice["stop_reason"]

    stop_id = {"stop_token_ids": tokens[2:3]}
    assert await stopped() == (text_of(3), "stop", None)
    assert await stopped(**stop_id) == (text_of(2), "stop", tokens[2])
    assert await stopped(**stop_id, include_stop_str_in_output=True) == (text_of(3), "stop", tokens[2])
    assert await stopped(include_stop_str_in_output=True) == (text_of(3), "stop", None)
    shown = {"include_stop_str_in_output": True, "skip_special_tokens": False}
    assert await stopped(**shown) == (text_of(3) + EOS, "stop", None)
    assert await stopped(skip_special_tokens=False) == (text_of(3), "stop", None)
    assert await stopped(stop_token_ids=[EOS_ID], ignore_eos=True) == (text_of(3), "stop", EOS_ID)
    assert await stopped(stop="w") == ("hello ", "stop", "w")
    assert (await stopped(ignore_eos=True))[1:] == ("length", None)


async def test_a_stop_string_counts_only_after_the_least_number_of_tokens() -> None:
    """A stop string that begins before `min_tokens` and ends after it counts, as in vLLM."""

    async def text(least: int) -> str:
        answer = await complete(FakeEngine(endless_text), stop=["hello", "o w"], min_tokens=least, max_tokens=40)
        return str(answer["choices"][0]["text"])

    assert await text(0) == ""
    assert await text(1) == "hell"
    assert await text(2) == TEXT


async def test_echo_puts_the_prompt_before_every_choice() -> None:
    engine = FakeEngine(endless_text)
    answer = await complete(engine, prompt=["hello", "x"], echo=True, max_tokens=2, stop="hello")
    assert [choice["text"] for choice in answer["choices"]] == ["hello", "x"]
    answer = await complete(engine, prompt=[TEXT_TOKENS], echo=True, max_tokens=2)
    assert answer["choices"][0]["text"] == TEXT + text_of(2)
    made = len(engine.streams)
    answer = await complete(engine, echo=True, max_tokens=0)
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("hello", "length")
    assert len(engine.streams) == made
    events = await stream(engine, echo=True, max_tokens=2)
    assert [event["choices"][0]["text"] for event in events] == ["hello" + text_of(1), " w"]


async def test_a_stream_has_one_token_in_each_chunk() -> None:
    events = await stream(FakeEngine(endless_text), max_tokens=3)
    assert [event["choices"] for event in events] == [
        [{"index": 0, "text": "hello", "logprobs": None, "finish_reason": None, "stop_reason": None}],
        [{"index": 0, "text": " w", "logprobs": None, "finish_reason": None, "stop_reason": None}],
        [{"index": 0, "text": "ö", "logprobs": None, "finish_reason": "length", "stop_reason": None}],
    ]
    assert {event["object"] for event in events} == {"text_completion"}
    assert len({event["id"] for event in events}) == 1
    assert all("usage" not in event for event in events)


async def test_half_a_character_waits_for_its_other_half() -> None:
    events = await stream(
        FakeEngine(lambda _: TOKENIZER.encode("a€b", add_special_tokens=False)),
        max_tokens=4,
        stream_options={"continuous_usage_stats": True},
    )
    assert [event["choices"][0]["text"] for event in events] == ["a", "€", "b"]
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 3, 4]


async def test_whole_characters_before_an_unfinished_one_are_not_lost() -> None:
    cut = small_tokenizer().get_vocab()["aâ"]
    answer = await complete(FakeEngine(lambda _: [*TEXT_TOKENS[:1], cut]), max_tokens=2)
    assert answer["choices"][0]["text"] == "helloa"


async def test_cached_tokens_of_a_prompt_count_once_as_its_first_choice_found_them() -> None:
    engine = FakeEngine(endless_text)
    engine.cached = lambda request: len(request.tokens) - 1 - request.sampling.choice
    fields: dict[str, Any] = {"prompt": [[1] * 5, [2] * 8], "n": 2, "max_tokens": 3}
    answer = await complete(engine, **fields)
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = await stream(engine, stream_options=options, **fields)
    found = [(chunk["choices"][0]["index"], chunk["usage"]["prompt_tokens_details"]) for chunk in chunks]
    assert sorted({(index, details["cached_tokens"]) for index, details in found}) == [(0, 4), (1, 3), (2, 7), (3, 6)]
    for usage in (answer["usage"], last["usage"]):
        assert (usage["prompt_tokens"], usage["prompt_tokens_details"]) == (13, {"cached_tokens": 11})


async def test_usage_comes_in_a_chunk_of_its_own() -> None:
    engine = FakeEngine(endless_text)
    *chunks, last = await stream(engine, n=2, max_tokens=3, stream_options={"include_usage": True})
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 2, "completion_tokens": 6, "total_tokens": 8, **NOT_CACHED}
    assert [chunk["usage"] for chunk in chunks] == [None] * 6


async def test_a_failure_in_mid_stream_is_an_event_that_names_no_file_and_no_tensor() -> None:
    *chunks, failure = await stream(FakeEngine(endless_text, fail_after=2))
    assert len(chunks) == 2
    assert failure["error"]["code"] == 503
    assert "Stage 1 on 127.0.0.1 died at step 7" in failure["error"]["message"]
    assert "/srv" not in failure["error"]["message"]
    assert "model.norm" not in failure["error"]["message"]


async def test_one_choice_that_fails_ends_the_others() -> None:
    engine = FakeEngine(lambda request: TEXT_TOKENS[: 2 + 2 * request.sampling.choice], fail_after=3)
    response = await post(engine, n=3, max_tokens=100)
    assert error_of(response, 503)["type"] == "ServiceUnavailableError"
    assert response.headers["retry-after"].isdecimal()
    assert [made.ended or made.aborted.is_set() for made in engine.streams] == [True, True, True]


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_a_stream_says_what_one_answer_says(data: st.DataObject) -> None:
    tokens = data.draw(st.lists(st.sampled_from([EOS_ID, *TEXT_TOKENS, *range(2, 250)]), min_size=1, max_size=40))
    fields: dict[str, Any] = {
        "max_tokens": data.draw(st.integers(1, len(tokens))),
        "stop": data.draw(st.lists(st.text("helo wörld€", min_size=1, max_size=3), max_size=4)),
        "ignore_eos": data.draw(st.booleans()),
        "echo": data.draw(st.booleans()),
        "n": data.draw(st.integers(1, 3)),
    }

    async def both() -> tuple[dict[str, Any], Events]:
        engine = FakeEngine(lambda request: tokens[request.sampling.choice :] + tokens)
        usage = {"stream_options": {"include_usage": True}}
        return await complete(engine, **fields), await stream(engine, **fields, **usage)

    answer, events = asyncio.run(both())
    for choice in answer["choices"]:
        pieces = [event["choices"][0] for event in events[:-1] if event["choices"][0]["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        assert [piece["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + [choice["finish_reason"]]
    assert events[-1]["usage"] == answer["usage"]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"temperature": 0, "n": 2}, "n", "greedy"),
        ({"prompt": [300]}, "prompt", "outside the vocabulary, 0 to 299"),
        ({"prompt": [-1]}, "prompt", "outside the vocabulary"),
        ({"prompt": [2**70]}, "prompt", "outside the vocabulary"),
        ({"prompt": [[]]}, "prompt", "no tokens"),
        ({"stop_token_ids": [300]}, "stop_token_ids", "outside the vocabulary"),
        ({"max_tokens": 255}, "max_tokens", "maximum context length is 256 tokens"),
        ({"max_tokens": 2**70}, "max_tokens", "maximum context length"),
        ({"prompt": [5] * 256}, "prompt", "maximum context length"),
        ({"prompt": "a" * 100000}, "prompt", "100000 characters cannot fit"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"suffix": "end"}, "suffix", "not served"),
        ({"logprobs": 21}, "logprobs", "asks for 21, but this server gives at most 20"),
        ({"logprobs": -1}, "logprobs", "asks for all"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "at most 20"),
        ({"logit_bias": {"300": 1}}, "logit_bias", "outside the vocabulary"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids", "outside the vocabulary"),
        ({"allowed_token_ids": list(range(300)), "n": 40, "prompt": ["a"] * 100}, "allowed_token_ids", "too many"),
        ({"bad_words": [" "]}, "bad_words", "without tokens"),
        ({"min_tokens": 17}, "min_tokens", "more than the 16 of max_tokens"),
        ({"truncate_prompt_tokens": 241}, "truncate_prompt_tokens", "more than the 240 tokens"),
        ({"truncate_prompt_tokens": 0}, "prompt", "no tokens"),
        ({"prompt": [5] * 257, "echo": True, "logprobs": 0, "max_tokens": 0}, "prompt", "maximum context length"),
    ],
)
async def test_a_request_that_does_not_fit_gets_400(fields: dict[str, Any], param: str, message: str) -> None:
    engine = FakeEngine(endless_text)
    error = error_of(await post(engine, **fields), 400)
    assert (error["param"], error["type"]) == (param, "BadRequestError")
    assert message in error["message"]
    assert engine.streams == []


async def test_max_tokens_by_default_is_what_room_there_is() -> None:
    engine = FakeEngine(endless_text)
    await complete(engine, prompt=[5] * 250)
    assert engine.streams[0].request.max_tokens == 6


async def test_an_unknown_model_gets_404() -> None:
    error = error_of(await post(FakeEngine(endless_text), model="large"), 404)
    assert (error["param"], error["type"]) == ("model", "NotFoundError")


async def test_a_request_that_the_engine_refuses_gets_an_answer_before_any_event() -> None:
    engine = FakeEngine(endless_text)
    engine.refusal = RequestError("This request needs more blocks than there are.", "prompt")
    error_of(await post(engine, stream=True), 400)
    engine.refusal = NotReadyError("Stage 1 is starting again.")
    assert "Stage 1" in error_of(await post(engine, stream=True), 503)["message"]


async def test_a_defect_gets_500_and_no_details() -> None:
    engine = FakeEngine(endless_text)
    engine.refusal = KeyError("secret")
    assert "secret" not in error_of(await post(engine), 500)["message"]


async def test_until_the_engine_is_ready_everything_is_503() -> None:
    engine = FakeEngine(endless_text)
    async with client(engine) as opened:
        progress = StageProgress(stage=0, host="host-a", rows=[0], phase="loading", layers_done=2, layers=3)
        for state, shown in (
            (EngineState(phase="loading", progress=progress), "Stage 0 on host-a: loading, 2 of 3 layers"),
            (failed_state(CheckpointError("Cannot read /srv/x/config.json\nTraceback")), "The engine failed."),
            (failed_state(PlacementError("2 stages need 2 rows.")), "The engine failed: 2 stages need 2 rows."),
        ):
            engine.state = state
            asked = ("/health", "/ping", "/v1/models", "/v1/models/small")
            for response in (
                *[await opened.get(path) for path in asked],
                await opened.post("/v1/completions", content=b"junk"),
            ):
                assert error_of(response, 503)["message"].endswith(shown)
                assert response.headers["retry-after"].isdecimal()
        engine.state = EngineState(phase="ready", detail="")
        assert (await opened.get("/health")).status_code == 200


async def test_models_say_their_name_and_length() -> None:
    async with client(FakeEngine(endless_text)) as opened:
        [card] = (await opened.get("/v1/models")).json()["data"]
        assert (card["id"], card["root"], card["max_model_len"]) == ("small", "org/small", 256)
        assert card["object"] == "model"
        assert (await opened.get("/v1/models/small")).json() == card
        error_of(await opened.get("/v1/models/org/other"), 404)


async def test_a_model_may_have_several_names() -> None:
    named = msgspec.structs.replace(MODEL, aliases=["r1", "org/r1"])
    async with client(FakeEngine(endless_text), named) as opened:
        cards = (await opened.get("/v1/models")).json()["data"]
        assert [card["id"] for card in cards] == ["small", "r1", "org/r1"]
        assert (await opened.get("/v1/models/org/r1")).json() == cards[2]
        for name in ("small", "r1", "org/r1"):
            answer = await opened.post("/v1/completions", json={"model": name, "prompt": "a", "max_tokens": 1})
            assert answer.json()["model"] == "small"
        error = error_of(await opened.post("/v1/completions", json={"model": "r2", "prompt": "a"}), 404)
        assert "'small', 'r1', 'org/r1'" in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": "hello"}, "prompt"),
        ({"prompt": ["a", "hello"]}, "prompt"),
        ({"prompt": "hello", "truncate_prompt_tokens": 1, "add_special_tokens": False}, "prompt"),
        ({"prompt": [1], "bad_words": ["hello"]}, "bad_words"),
        ({"prompt": [265]}, "prompt"),
        ({"prompt": [1], "stop_token_ids": [265]}, "stop_token_ids"),
        ({"prompt": [1], "allowed_token_ids": [265]}, "allowed_token_ids"),
        ({"prompt": [1], "logit_bias": {"265": 1}}, "logit_bias"),
    ],
)
async def test_a_token_that_the_model_does_not_have_is_refused_however_it_came(
    fields: dict[str, Any], param: str
) -> None:
    """The tokenizer has more tokens than the model, as one with tokens that were added later."""
    [hello] = TOKENIZER.encode("hello", add_special_tokens=False)
    model = msgspec.structs.replace(MODEL, vocab_size=hello)
    engine = FakeEngine(endless_text)
    async with client(engine, model) as opened:
        answer = await opened.post("/v1/completions", json={"max_tokens": 1, **fields})
        assert error_of(answer, 400)["param"] == param
    assert not engine.streams


async def test_other_paths_and_methods_get_errors_of_the_same_form() -> None:
    async with client(FakeEngine(endless_text)) as opened:
        error_of(await opened.get("/"), 404)
        error_of(await opened.get("/v1/completions"), 405)
        assert (await opened.get("/version")).json()["version"]
        schema = (await opened.get("/openapi.json")).json()
        content = schema["paths"]["/v1/completions"]["post"]["requestBody"]["content"]
        assert content["application/json"]["schema"] == {"$ref": "#/components/schemas/CompletionRequest"}
        assert "prompt" in schema["components"]["schemas"]["CompletionRequest"]["properties"]


@pytest.mark.parametrize(("given_id", "is_kept"), [("bench-7", True), ("a b", False), ("x" * 200, False), ("", False)])
async def test_a_request_id_is_kept_if_it_can_be(given_id: str, is_kept: bool) -> None:
    async with client(FakeEngine(endless_text)) as opened:
        for streamed in (False, True):
            response = await opened.post(
                "/v1/completions", json={"prompt": "a", "stream": streamed}, headers={"x-request-id": given_id}
            )
            assert (response.headers["x-request-id"] == given_id) is is_kept
            assert f'"id":"cmpl-{response.headers["x-request-id"]}"' in response.text


async def test_a_request_may_bring_its_id_as_a_field() -> None:
    async with client(FakeEngine(endless_text)) as opened:
        body = {"prompt": "a", "request_id": "mine"}
        response = await opened.post("/v1/completions", json=body)
        assert (response.headers["x-request-id"], response.json()["id"]) == ("mine", "cmpl-mine")
        response = await opened.post("/v1/completions", json=body, headers={"x-request-id": "first"})
        assert (response.headers["x-request-id"], response.json()["id"]) == ("first", "cmpl-first")
        response = await opened.post("/v1/completions", json={**body, "request_id": "no header\n"})
        assert "cmpl-" + response.headers["x-request-id"] == response.json()["id"]
        response = await opened.post("/v1/completions", json={"prompt": 1}, headers={"x-request-id": "first"})
        error_of(response, 400)
        assert response.headers["x-request-id"] == "first"


async def test_every_request_ends_in_one_line_of_the_log() -> None:
    engine = FakeEngine(lambda request: [*TEXT_TOKENS[: request.sampling.choice], EOS_ID])
    with capture_logs() as logs:
        await post(engine, n=3, prompt=["a", "b"], request_id="mine")
        await stream(FakeEngine(endless_text), max_tokens=3, request_id="streamed")
        await stream(FakeEngine(endless_text, fail_after=2), request_id="broken")
        await post(FakeEngine(endless_text, fail_after=2), request_id="failed")
    whole, streamed, broken, failed = logs
    assert 0 <= whole.pop("seconds") < 60
    assert whole == {
        "event": "completion ended",
        "log_level": "info",
        "id": "cmpl-mine",
        "engine_requests": "1-6",
        "prompt_tokens": 4,
        "cached_tokens": 0,
        "completion_tokens": 12,
        "finish_reasons": {"stop": 6},
    }
    assert (streamed["id"], streamed["engine_requests"], streamed["finish_reasons"]) == (
        "cmpl-streamed",
        "1",
        {"length": 1},
    )
    for line, answer_id in ((broken, "cmpl-broken"), (failed, "cmpl-failed")):
        assert (line["log_level"], line["event"], line["id"]) == ("warning", "completion failed", answer_id)
        assert "died at step 7" in line["error"]
        assert (line["completion_tokens"], line["finish_reasons"]) == (2, {"abort": 1})


async def test_whatever_is_logged_within_a_request_says_its_id() -> None:
    def logging_script(_: AddRequest) -> list[int]:
        structlog.get_logger().info("within")
        return TEXT_TOKENS

    output: list[MutableMapping[str, Any]] = []

    def record(_: object, __: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        output.append(dict(fields))
        raise structlog.DropEvent

    structlog.configure(processors=[structlog.contextvars.merge_contextvars, record])
    try:
        await post(FakeEngine(logging_script), request_id="mine")
    finally:
        structlog.reset_defaults()
    assert [(line["event"], line["request_id"]) for line in output] == [
        ("within", "mine"),
        ("completion ended", "mine"),
    ]


async def test_special_tokens_may_be_left_out_of_the_prompt_and_kept_in_the_text() -> None:
    engine = FakeEngine(lambda _: [EOS_ID, TEXT_TOKENS[0]])
    answer = await complete(engine, add_special_tokens=False, skip_special_tokens=False, ignore_eos=True, max_tokens=2)
    assert engine.streams[0].request.tokens == TEXT_TOKENS[:1]
    assert answer["choices"][0]["text"] == f"{EOS}hello"
