"""The private names of uvicorn that api/server/client_protocol.py relies on: this fails when they change."""

import asyncio
import inspect
from typing import Any
from unittest.mock import MagicMock

import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from api.server.client_protocol import ClientProtocol, HttpServer, UnchunkedCycle, client_protocol

CALLED_BY_UVICORN = ("on_response_complete", "timeout_keep_alive_handler", "send_400_response")
CALLED_BY_THE_PARSER = ("on_message_begin", "on_header", "on_headers_complete", "on_body", "on_message_complete")
CALLED_BY_THE_LOOP = ("connection_made", "connection_lost", "data_received", "pause_writing", "resume_writing")


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that is never called."""


async def connection() -> ClientProtocol:
    config = uvicorn.Config(app, http=client_protocol(1.0), log_config=None)
    made = client_protocol(1.0)(config=config, server_state=ServerState(), app_state={})
    made.connection_made(MagicMock(spec=asyncio.Transport))
    return made


def test_every_method_that_is_extended_is_one_of_uvicorns_with_the_same_parameters() -> None:
    for name in (*CALLED_BY_UVICORN, *CALLED_BY_THE_PARSER, *CALLED_BY_THE_LOOP):
        assert name in vars(ClientProtocol)
        ours = inspect.signature(getattr(ClientProtocol, name)).parameters
        assert list(ours) == list(inspect.signature(getattr(HttpToolsProtocol, name)).parameters)


async def test_a_connection_has_the_attributes_that_are_read() -> None:
    made = await connection()
    assert vars(made)["cycle"] is None
    assert made.loop is asyncio.get_running_loop()
    assert isinstance(made.flow, FlowControl)
    assert made.flow.read_paused is False
    assert isinstance(made.transport, asyncio.Transport)
    made.connection_lost(None)


async def test_a_client_that_resets_its_connection_leaves_no_timer() -> None:
    made = await connection()
    made.timeout_keep_alive_task = timer = MagicMock(spec=asyncio.TimerHandle)
    made.connection_lost(ConnectionResetError())
    timer.cancel.assert_called_once()
    # What uvicorn may still do with the answer of a client that is gone begins no wait for its reading.
    made.timeout_keep_alive_handler()
    made.pause_writing()
    assert made._unread is None
    assert made._arriving is None


async def test_uvicorn_has_what_an_answer_without_chunks_is_made_of() -> None:
    sent: list[bytes] = []
    transport = MagicMock(spec=asyncio.Transport)
    transport.write = sent.append
    parameters: dict[str, Any] = {name: MagicMock() for name in inspect.signature(RequestResponseCycle).parameters}
    scope = {"method": "GET", "http_version": "1.0"}
    flow = MagicMock(write_paused=False)
    given: dict[str, Any] = {
        "transport": transport,
        "scope": scope,
        "flow": flow,
        "default_headers": [],
        "keep_alive": False,
    }
    cycle = RequestResponseCycle(**{**parameters, **given, "access_log": False})
    cycle.__class__ = UnchunkedCycle
    await cycle.send({"type": "http.response.start", "status": 200, "headers": []})
    for body, more in ((b"a", True), (b"bc", True), (b"", False)):
        await cycle.send({"type": "http.response.body", "body": body, "more_body": more})
    assert b"".join(sent) == b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nabc"
    assert cycle.response_complete


def test_a_response_tells_how_far_it_is() -> None:
    cycle = RequestResponseCycle(*[MagicMock() for _ in inspect.signature(RequestResponseCycle).parameters])
    assert (cycle.response_started, cycle.response_complete) == (False, False)


def test_status_lines_are_whole_lines() -> None:
    assert STATUS_LINE[408] == b"HTTP/1.1 408 Request Timeout\r\n"
    assert STATUS_LINE[431].startswith(b"HTTP/1.1 431 ")


def test_uvicorn_installs_its_signal_handlers_where_ours_installs_none() -> None:
    assert "capture_signals" in vars(uvicorn.Server)
    assert "self.capture_signals()" in inspect.getsource(uvicorn.Server.serve)
    assert "capture_signals" in vars(HttpServer)
    assert uvicorn.Server(uvicorn.Config(app)).should_exit is False
