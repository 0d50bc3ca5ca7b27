"""uvicorn's HTTP/1.1, with bounds on what a client may make it wait for and remember, and without its signal handlers.

uvicorn itself has a deadline for idle connections alone: a client that sends a byte a second, or never reads its
answer, would hold its connection and its request for ever. This is the one file that relies on names of uvicorn that
are not its public interface; tests/api/server/test_client_protocol.py has them all.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import ClassVar, cast

import structlog
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from api.openai.responses import encode, status_body
from api.settings.server import DEFAULT_CLIENT_TIMEOUT_S

HEADER_BYTES_MAX = 1 << 16
"""The most bytes of a request's line and header fields together: twice what nginx accepts by default."""

TIMED_OUT = "The request was not complete within {:g} s: send it faster."
HEADER_TOO_LARGE = f"The request's line and header fields are longer than {HEADER_BYTES_MAX} bytes: send less."

log = structlog.get_logger()


class ClientProtocol(HttpToolsProtocol):
    """One connection, which is cut where a request takes too long to come, or its answer too long to be read.

    A request has `client_timeout_s` seconds from its first byte to the last of its body, a connection as long until
    the first byte. A client that has left more unread than the system's buffers and the transport's own 64 KiB hold
    has as long to make room. Then its request is aborted, as if the client had gone away.
    """

    client_timeout_s: ClassVar[float] = DEFAULT_CLIENT_TIMEOUT_S

    _arriving: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _is_in_header = False
    _is_refused = False
    _header_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop at the beginning."""
        # uvloop's transports are not subclasses of asyncio's.
        super().connection_made(cast("asyncio.Transport", transport))
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the loop at the end."""
        self._arrived()
        self._was_read()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Called by the loop with each read."""
        if self._is_refused:
            return
        super().data_received(data)
        if self._is_in_header:
            # The parser calls `on_header` when a field is complete: one that never ends is counted here only.
            self._count_header(len(data))

    def on_message_begin(self) -> None:
        """Called by the parser at a request's first byte."""
        self._is_in_header = True
        self._header_bytes = 0
        self._await_request()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser with each field."""
        if self._header_bytes <= HEADER_BYTES_MAX:
            super().on_header(name, value)
        self._count_header(len(name) + len(value))

    def on_headers_complete(self) -> None:
        """Called by the parser before the body."""
        self._is_in_header = False
        if not self._is_refused:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Called by the parser with each part of the body."""
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Called by the parser at a request's end."""
        if not self._is_refused:
            self._arrived()
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """Called by uvicorn when an answer has been written; its last bytes may still wait for the client."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._await_reader()

    def timeout_keep_alive_handler(self) -> None:
        """Called by uvicorn when a connection was idle for long."""
        super().timeout_keep_alive_handler()
        self._await_reader()

    def pause_writing(self) -> None:
        """Called by the transport when more is unread than its limit."""
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        """Called by the transport when there is room again."""
        super().resume_writing()
        self._was_read()

    def _await_request(self) -> None:
        self._arrived()
        self._arriving = self.loop.call_later(self.client_timeout_s, self._give_up_request)

    def _arrived(self) -> None:
        if self._arriving is not None:
            self._arriving.cancel()
            self._arriving = None

    def _give_up_request(self) -> None:
        self._arriving = None
        if self.flow.read_paused:
            # The client is not at fault: the server does not read on before it has given another answer.
            self._await_request()
            return
        log.info("client cut off", cause="its request took too long to come", seconds=self.client_timeout_s)
        if self.cycle is None or self.cycle.response_complete:
            is_expected = self._is_in_header
        else:
            is_expected = not self.cycle.response_started
        if is_expected:
            self._refuse(408, TIMED_OUT.format(self.client_timeout_s))
        self.transport.close()

    def _count_header(self, count: int) -> None:
        self._header_bytes += count
        if self._header_bytes > HEADER_BYTES_MAX and not self._is_refused:
            self._refuse(431, HEADER_TOO_LARGE)

    def _refuse(self, status: int, message: str) -> None:
        """Answers in place of the application, and ignores what this client still sends."""
        self._is_refused = True
        self._arrived()
        body = encode(status_body(status, message))
        fields = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + fields + body)
        self.transport.close()
        self._await_reader()

    def _await_reader(self) -> None:
        if self._unread is None:
            self._unread = self.loop.call_later(self.client_timeout_s, self._give_up_reader)

    def _was_read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _give_up_reader(self) -> None:
        self._unread = None
        log.info("client cut off", cause="it does not read its answer", seconds=self.client_timeout_s)
        self.transport.abort()


def client_protocol(timeout_s: float) -> type[ClientProtocol]:
    """The protocol class for uvicorn's configuration, with this many seconds for slow clients."""

    class ConfiguredProtocol(ClientProtocol):
        client_timeout_s = timeout_s

    return ConfiguredProtocol


class HttpServer(uvicorn.Server):
    """A uvicorn server that leaves signals alone: `serve` handles them, as it has an engine to end before it exits."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Does nothing in place of uvicorn's own, which would install handlers."""
        yield
