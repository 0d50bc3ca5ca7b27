"""The front end on a real socket, with the clients that people use."""

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import httpx
import openai
import pytest

from api.errors import NotReadyError
from api.server.request import BODY_BYTES_MAX
from tests.support.api_server import DEADLINE_S, TEXT_TOKENS, TOKENIZER, endless_text, never_ending, serving_app
from tests.support.fake_engine import FakeEngine

PROMPT: dict[str, Any] = {"prompt": "hello", "max_tokens": 100}


def wait_for_abort(engine: FakeEngine) -> None:
    """Fails unless every request is aborted before the deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while not (engine.streams and all(stream.aborted.is_set() for stream in engine.streams)):
        assert time.monotonic() < deadline, "a request that nobody waits for was not aborted"
        time.sleep(0.01)


def test_openais_client_completes_and_streams() -> None:
    with serving_app(FakeEngine(endless_text)) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="x") as client:
        [model] = client.models.list().data
        answer = client.completions.create(
            model=model.id, prompt="hello", max_tokens=20, temperature=0, extra_body={"top_k": 1}
        )
        text = TOKENIZER.decode(TEXT_TOKENS[:20])
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (text, "length")
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 20
        chunks = list(
            client.completions.create(
                model=model.id, prompt="hello", max_tokens=20, stream=True, stream_options={"include_usage": True}
            )
        )
        assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == text
        assert chunks[-1].usage == answer.usage


def test_openais_client_reads_log_probabilities_echoes_and_several_choices() -> None:
    with serving_app(FakeEngine(endless_text)) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="x") as client:
        fields: dict[str, Any] = {
            "model": "small",
            "prompt": "hello",
            "max_tokens": 3,
            "n": 2,
            "echo": True,
            "logprobs": 2,
        }
        answer = client.completions.create(**fields)
        assert [choice.text for choice in answer.choices] == ["hellohello wö"] * 2
        logprobs = answer.choices[1].logprobs
        assert logprobs is not None
        assert logprobs.tokens is not None
        assert logprobs.tokens[1:] == ["hello", "hello", " w", "ö"]
        assert logprobs.token_logprobs is not None
        assert logprobs.top_logprobs is not None
        for logprob, top in zip(logprobs.token_logprobs[1:], logprobs.top_logprobs[1:], strict=True):
            assert logprob in top.values()
        streamed: list[str] = []
        for chunk in client.completions.create(**fields, stream=True):
            [choice] = chunk.choices
            assert choice.logprobs is not None
            streamed += choice.logprobs.tokens or [] if choice.index == 1 else []
        assert streamed == logprobs.tokens
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 6)


def test_openais_client_tells_errors_apart() -> None:
    engine = FakeEngine(endless_text)
    with (
        serving_app(engine) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client,
    ):
        with pytest.raises(openai.NotFoundError, match="'small'"):
            client.completions.create(model="other", prompt="hello")
        refused: list[dict[str, Any]] = [{"temperature": -1}, {"logprobs": 21}, {"suffix": "end"}]
        for fields in (*refused, {"extra_body": {"min_p": 2}}):
            with pytest.raises(openai.BadRequestError) as caught:
                client.completions.create(model="small", prompt="hello", **fields)
            [param] = fields.get("extra_body", fields)
            assert (caught.value.param, caught.value.type) == (param, "BadRequestError")
        engine.refusal = NotReadyError("Stage 1 is starting again.")
        with pytest.raises(openai.InternalServerError, match="Stage 1") as unready:
            client.completions.create(model="small", prompt="hello")
        assert unready.value.status_code == 503


def test_openais_client_raises_on_a_failure_in_mid_stream() -> None:
    engine = FakeEngine(endless_text, fail_after=2)
    with serving_app(engine) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="x") as client:
        chunks = client.completions.create(model="small", prompt="hello", stream=True)
        with pytest.raises(openai.APIError, match="Stage 1"):
            list(chunks)


def test_a_client_that_leaves_a_stream_ends_the_work() -> None:
    engine = FakeEngine(never_ending)
    with serving_app(engine) as url:
        with httpx.stream("POST", f"{url}/v1/completions", json={**PROMPT, "stream": True, "n": 2}) as response:
            assert next(response.iter_lines()).startswith("data: ")
        wait_for_abort(engine)
        assert len(engine.streams) == 2


def test_a_client_that_leaves_before_its_answer_ends_the_work() -> None:
    engine = FakeEngine(never_ending)
    with serving_app(engine) as url:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/completions", json={**PROMPT, "prompt": ["a", "b"]}, timeout=0.5)
        wait_for_abort(engine)
        assert len(engine.streams) == 2


def test_a_client_that_leaves_within_its_body_leaves_nothing() -> None:
    engine = FakeEngine(endless_text)
    with serving_app(engine) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), DEADLINE_S) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert httpx.get(f"{url}/health").status_code == 200
    assert engine.streams == []


def test_every_event_of_a_stream_comes_when_its_token_does() -> None:
    """The engine waits for ever after two tokens, so their text must have come before."""
    engine = FakeEngine(never_ending)
    with (
        serving_app(engine) as url,
        httpx.stream("POST", f"{url}/v1/completions", json={**PROMPT, "stream": True}) as response,
    ):
        lines = response.iter_lines()
        texts: list[str] = []
        while len(texts) < 2:
            line = next(lines)
            if line:
                texts.append(json.loads(line.removeprefix("data: "))["choices"][0]["text"])
        assert texts == ["hello", " w"]


def test_a_body_that_is_too_large_gets_413_and_the_server_goes_on() -> None:
    with serving_app(FakeEngine(endless_text)) as url, httpx.Client(timeout=DEADLINE_S) as client:
        response = client.post(f"{url}/v1/completions", content=b" " * (BODY_BYTES_MAX + 1))
        assert response.status_code == 413
        assert response.json()["error"]["type"] == "PayloadTooLargeError"
        assert client.post(f"{url}/v1/completions", json=PROMPT).status_code == 200


def test_long_prompts_are_tokenised_on_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop answers while the tokeniser is held up."""
    held, reached = threading.Event(), threading.Event()
    encode = type(TOKENIZER).encode

    def slow_encode(self: Any, text: str, add_special_tokens: bool = True, **options: Any) -> list[int]:
        reached.set()
        assert held.wait(DEADLINE_S)
        return encode(self, text, add_special_tokens, **options)

    monkeypatch.setattr(type(TOKENIZER), "encode", slow_encode)
    body = {"prompt": "hello" * 20, "max_tokens": 1, "user": "x" * 5000}
    with serving_app(FakeEngine(endless_text)) as url:
        answers: list[int] = []
        thread = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code)
        )
        thread.start()
        assert reached.wait(DEADLINE_S)
        assert httpx.get(f"{url}/health", timeout=DEADLINE_S).status_code == 200
        held.set()
        thread.join(DEADLINE_S)
    assert answers == [200]


async def test_many_streams_at_once_do_not_mix() -> None:
    engine = FakeEngine(lambda request: request.tokens[1:] * 100)
    with serving_app(engine) as url:
        async with httpx.AsyncClient(timeout=60) as client:

            async def one(prompt: str) -> str:
                body = {"prompt": prompt, "max_tokens": 50, "stream": True}
                async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
                    lines = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
                assert lines.pop() == "[DONE]"
                return "".join(json.loads(line)["choices"][0]["text"] for line in lines)

            prompts = [chr(ord("a") + number) for number in range(26)]
            assert await asyncio.gather(*map(one, prompts)) == [prompt * 50 for prompt in prompts]


def test_the_front_end_needs_neither_torch_nor_transformers_nor_ray() -> None:
    """Each of them would take seconds at the start, and hundreds of megabytes."""
    code = (
        "import sys, api.cli, api.server.app;"
        "print([name for name in ('torch', 'transformers', 'ray', 'huggingface_hub') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
