"""Clients that send or read too slowly, or send too much: they are cut off, and nobody else waits for them."""

import contextlib
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx
import msgspec
import pytest
from structlog.testing import capture_logs

from api.client.open_requests import OUTPUTS_WAITING_MAX, RequestStream
from api.errors import EngineError
from api.messages.engine import AddRequest, RequestOutput
from api.server.access import UNKNOWN, RequestWatch
from api.server.client_protocol import HEADER_BYTES_MAX, PROBES_MAX
from tests.support.api_server import DEADLINE_S, MODEL, TEXT_TOKENS, endless_text, never_ending, serving_app
from tests.support.fake_engine import FakeEngine
from tests.support.scheduling import GREEDY

PATIENCE_S = 0.3
BODY = b'{"prompt": "hello", "max_tokens": 3}'
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
LONG_MODEL = msgspec.structs.replace(MODEL, max_model_len=100_000)
LONG_TOKENS = 50_000
"""Their events are more than twice what the system's buffers take from a client that does not read."""


@contextmanager
def connected(url: str, receive_buffer: int | None = None) -> Iterator[socket.socket]:
    address = urlsplit(url)
    assert address.hostname is not None
    assert address.port is not None
    with socket.socket() as client:
        if receive_buffer is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(DEADLINE_S)
        client.connect((address.hostname, address.port))
        yield client


def read_all(client: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    parts = []
    try:
        while part := client.recv(1 << 16):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def read_answer(client: socket.socket) -> bytes:
    """One answer whose body is a JSON object, of a connection that stays open."""
    answer = b""
    while not answer.endswith(b"}"):
        part = client.recv(1 << 16)
        assert part, answer
        answer += part
    return answer


def drip(client: socket.socket, data: bytes) -> None:
    """Sends a byte every few milliseconds, until the server has closed the connection."""
    try:
        for byte in data:
            client.sendall(bytes([byte]))
            time.sleep(PATIENCE_S / 20)
    except OSError:
        pass


def assert_served(url: str) -> None:
    answer = httpx.post(f"{url}/v1/completions", content=BODY, timeout=DEADLINE_S)
    assert answer.json()["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("at_once", "slowly"),
    [
        (b"", HEAD + b"x-rest: " + b"x" * 1000),
        (HEAD + b"content-length: 10000\r\n\r\n", b"{" + b" " * 1000),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n", b"1\r\n \r\n" * 1000),
    ],
)
def test_a_request_that_comes_byte_by_byte_is_given_up(at_once: bytes, slowly: bytes) -> None:
    with serving_app(FakeEngine(endless_text), client_timeout_s=PATIENCE_S) as url, connected(url) as client:
        client.sendall(at_once)
        dripping = threading.Thread(target=drip, args=(client, slowly))
        dripping.start()
        assert_served(url)
        answer = read_all(client)
        dripping.join(DEADLINE_S)
        assert not dripping.is_alive()
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"type":"RequestTimeoutError"' in answer


def test_a_connection_without_a_request_is_closed() -> None:
    with serving_app(FakeEngine(endless_text), client_timeout_s=PATIENCE_S) as url, connected(url) as client:
        assert read_all(client) == b""


def test_a_slow_body_behind_an_early_refusal_is_not_awaited_for_ever() -> None:
    engine = FakeEngine(endless_text)
    engine.state = msgspec.structs.replace(engine.state, phase="loading")
    with serving_app(engine, client_timeout_s=PATIENCE_S) as url, connected(url) as client:
        client.sendall(HEAD + b"content-length: 10000\r\n\r\n")
        answer = read_all(client)
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert answer.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize(
    "fields",
    [
        b"".join(b"x-%d: %s\r\n" % (index, b"y" * 1000) for index in range(70)) + b"\r\n",
        b"x-long: " + b"y" * (HEADER_BYTES_MAX + 1) + b"\r\n\r\n",
        b"x-endless: " + b"y" * (4 * HEADER_BYTES_MAX),
    ],
)
def test_a_header_that_is_too_large_is_refused(fields: bytes) -> None:
    engine = FakeEngine(endless_text)
    with serving_app(engine) as url, connected(url) as client:
        client.sendall(HEAD + fields)
        answer = read_all(client)
        assert_served(url)
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert answer.count(b"HTTP/1.1") == 1
    assert len(engine.streams) == 1


@pytest.mark.slow
def test_a_client_that_never_reads_is_cut_off_and_nobody_waits_for_it() -> None:
    engine = FakeEngine(lambda request: TEXT_TOKENS * (request.max_tokens // len(TEXT_TOKENS) + 1))
    body = b'{"prompt": "hello", "stream": true, "max_tokens": %d}' % LONG_TOKENS
    with (
        serving_app(engine, LONG_MODEL, PATIENCE_S) as url,
        connected(url, receive_buffer=4096) as client,
    ):
        client.sendall(HEAD + b"content-length: %d\r\n\r\n%s" % (len(body), body))
        deadline = time.monotonic() + DEADLINE_S
        unread = None
        while unread is None:
            assert time.monotonic() < deadline
            assert_served(url)
            cut = [stream for stream in engine.streams if stream.aborted.is_set()]
            unread = cut[0].outputs.qsize() if cut else None
        assert not read_all(client).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert unread > LONG_TOKENS / 10


def test_a_client_that_reads_may_wait_for_its_tokens_as_long_as_it_takes() -> None:
    engine = FakeEngine(never_ending)
    with serving_app(engine, client_timeout_s=PATIENCE_S) as url, httpx.Client(timeout=DEADLINE_S) as client:
        body = {"prompt": "hello", "stream": True, "max_tokens": 50}
        with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            lines = response.iter_lines()
            assert "text" in next(lines)
            # By the server's own clock, longer than anything but the engine gets: two silent connections end meanwhile.
            for _ in range(2):
                with connected(url) as silent:
                    assert read_all(silent) == b""
            engine.streams[-1].fail()
            assert list(lines)[-2] == "data: [DONE]"


REQUEST = AddRequest(request_id=1, tokens=[1], max_tokens=2, stop_token_ids=[], sampling=GREEDY)


def output(finish: bool = False) -> RequestOutput:
    return RequestOutput(request_id=1, tokens=[1], finish_reason="length" if finish else None, error=None)


async def test_a_consumer_that_falls_far_behind_is_aborted_and_finds_what_it_missed_named() -> None:
    aborted: list[tuple[int, str]] = []
    stream = RequestStream(REQUEST, lambda request_id, reason: aborted.append((request_id, reason)))
    for _ in range(OUTPUTS_WAITING_MAX):
        stream.push(output())
    assert not aborted
    stream.push(output())
    assert aborted == [(1, "abort")]
    for _ in range(OUTPUTS_WAITING_MAX):
        assert (await anext(stream)).tokens == [1]
    with pytest.raises(EngineError, match=f"read too slowly: {OUTPUTS_WAITING_MAX} parts"):
        await anext(stream)
    await stream.aclose()
    assert len(aborted) == 1


async def test_the_last_token_always_has_room() -> None:
    stream = RequestStream(REQUEST, lambda _, __: pytest.fail("it has ended by itself"))
    for _ in range(OUTPUTS_WAITING_MAX):
        stream.push(output())
    stream.push(output(finish=True))
    outputs = [output async for output in stream]
    assert len(outputs) == OUTPUTS_WAITING_MAX + 1


def test_a_client_of_http_1_0_gets_its_stream_as_it_is() -> None:
    body = b'{"prompt": "hello", "max_tokens": 3, "stream": true}'
    with serving_app(FakeEngine(endless_text)) as url, connected(url) as client:
        head = HEAD.replace(b"HTTP/1.1", b"HTTP/1.0") + b"content-length: %d\r\n\r\n" % len(body)
        client.sendall(head + body)
        header, _, events = read_all(client).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in header.lower()
    assert b"connection: close" in header.lower()
    assert events.startswith(b"data: {")
    assert events.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    "sent", [b"hello\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01", b"GET http://[ HTTP/1.1\r\n\r\n"]
)
def test_what_is_not_http_gets_an_error_of_the_usual_form_and_is_counted(sent: bytes) -> None:
    watch = RequestWatch()
    with capture_logs() as logs, serving_app(FakeEngine(endless_text), watch=watch) as url, connected(url) as client:
        client.sendall(sent)
        header, _, body = read_all(client).partition(b"\r\n\r\n")
        address = "{}:{}".format(*client.getsockname())
    assert header.startswith(b"HTTP/1.1 400 ")
    assert b"content-type: application/json" in header
    assert msgspec.json.decode(body)["error"]["type"] == "BadRequestError"
    assert watch.requests == {(UNKNOWN, UNKNOWN, "400"): 1}
    assert [line["client"] for line in logs if line["event"] == "request refused"] == [address]


def test_a_client_that_is_cut_off_is_named() -> None:
    with (
        capture_logs() as logs,
        serving_app(FakeEngine(endless_text), client_timeout_s=PATIENCE_S) as url,
        connected(url) as client,
    ):
        client.sendall(b"GET /he")
        read_all(client)
        address = "{}:{}".format(*client.getsockname())
    assert [line["client"] for line in logs if line["event"] == "client cut off"] == [address]


def test_a_client_that_reads_its_answer_and_resets_is_not_said_to_be_slow() -> None:
    """The connection's state goes at once: what follows on other connections is served long after both timers."""
    with (
        capture_logs() as logs,
        serving_app(FakeEngine(endless_text), client_timeout_s=PATIENCE_S, keep_alive_s=PATIENCE_S / 10) as url,
    ):
        for _ in range(5):
            with connected(url) as client:
                client.sendall(HEAD + b"content-length: %d\r\n\r\n%s" % (len(BODY), BODY))
                assert read_answer(client).startswith(b"HTTP/1.1 200 ")
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # By the server's own clock: a silent connection is closed when the others' timers have long passed.
        for _ in range(2):
            with connected(url) as silent:
                assert read_all(silent) == b""
    cut = [line["cause"] for line in logs if line["event"] == "client cut off"]
    assert not [cause for cause in cut if "read" in cause]


def test_connections_beyond_the_limit_are_refused_but_for_probes() -> None:
    watch = RequestWatch()
    with (
        serving_app(FakeEngine(endless_text), watch=watch, connections=2) as url,
        connected(url) as first,
        connected(url) as second,
    ):
        for client in (first, second):
            client.sendall(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n")
            assert read_answer(client).startswith(b"HTTP/1.1 200 ")
        assert httpx.get(f"{url}/health").status_code == 200
        refused = httpx.post(f"{url}/v1/completions", content=BODY)
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "ServiceUnavailableError")
        assert refused.headers["connection"] == "close"
        with contextlib.ExitStack() as stack:
            crowd = [stack.enter_context(connected(url)) for _ in range(PROBES_MAX + 1)]
            assert read_all(crowd[-1]).startswith(b"HTTP/1.1 503 ")
        first.sendall(HEAD + b"content-length: %d\r\n\r\n%s" % (len(BODY), BODY))
        assert read_answer(first).startswith(b"HTTP/1.1 200 ")
    assert watch.requests[UNKNOWN, UNKNOWN, "503"] >= 1


def test_the_limit_of_files_is_raised_as_far_as_it_may_be() -> None:
    code = (
        "import resource; from api.server.client_protocol import raise_descriptor_limit;"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1];"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard));"
        "most = raise_descriptor_limit(); soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0];"
        "print(soft == min(hard, 1 << 20) if hard >= 0 else soft == 1 << 20, 0 < most < soft)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["True", "True"]
