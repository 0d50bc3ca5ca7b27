"""uvicorn's HTTP/1.1, with bounds on what a client may make it wait for and remember, and without its signal handlers.

uvicorn itself has a deadline for idle connections alone: a client that sends a byte a second, or never reads its
answer, would hold its connection and its request for ever. This is the one file that relies on names of uvicorn that
are not its public interface; tests/api/server/test_client_protocol.py has them all.
"""

import asyncio
import contextlib
import resource
import socket
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any, ClassVar, cast

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from actors.errors import StartError
from api.openai.bodies import encode, error_response, status_body
from api.server.access import PROBES, RequestWatch, address
from api.settings.server import DEFAULT_CLIENT_TIMEOUT_S

HEADER_BYTES_MAX = 1 << 16
"""The most bytes of a request's line and header fields together: twice what nginx accepts by default."""

DESCRIPTORS_KEPT = 128
"""The file descriptors that are kept for all but clients: engines, logs, files that are read."""

DESCRIPTORS_MAX = 1 << 20
PROBES_MAX = 64
"""The connections beyond the limit that are still answered, so that probes learn how the server is."""

TIMED_OUT = "The request was not complete within {:g} s: send it faster."
HEADER_TOO_LARGE = f"The request's line and header fields are longer than {HEADER_BYTES_MAX} bytes: send less."
MALFORMED = "This is not an HTTP request: check the address, and whether it is http or https."
CROWDED = "The server has as many connections as its file descriptors allow: try again later."


class UnchunkedCycle(RequestResponseCycle):
    """An answer to a client of HTTP/1.0, which knows no chunks: where its length is unknown, it ends the connection."""

    _has_length = True

    async def send(self, message: Message) -> None:  # type: ignore[override]  # uvicorn has types of its own
        """Sends a part of the answer."""
        if message["type"] == "http.response.start":
            self._has_length = any(name.lower() == b"content-length" for name, _ in message.get("headers", []))
            if not self._has_length:
                self.chunked_encoding = False
        elif not self._has_length:
            self.expected_content_length = len(message.get("body", b""))
        await super().send(message)  # type: ignore[arg-type]


class ClientProtocol(HttpToolsProtocol):
    """One connection, which is cut where a request takes too long to come, or its answer too long to be read.

    A request has `client_timeout_s` seconds from its first byte to the last of its body, a connection as long until
    the first byte. A client that has left more unread than the system's buffers and the transport's own 64 KiB hold
    has as long to make room. Then its request is aborted, as if the client had gone away. Of more than
    `connections_max` connections only probes are answered. `watch` is told of what never becomes a request.
    """

    client_timeout_s: ClassVar[float] = DEFAULT_CLIENT_TIMEOUT_S
    connections_max: ClassVar[int] = 1 << 16
    watch: ClassVar[RequestWatch] = RequestWatch()

    _arriving: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _is_in_header = False
    _is_refused = False
    _is_lost = False
    _header_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop at the beginning."""
        # uvloop's transports are not subclasses of asyncio's.
        super().connection_made(cast("asyncio.Transport", transport))
        crowd = len(self.connections) - self.connections_max
        if crowd > PROBES_MAX:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, CROWDED)
            return
        if crowd > 0:
            self.app = probes_alone(self.app)
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the loop at the end."""
        self._is_lost = True
        self._arrived()
        self._was_read()
        # uvicorn keeps this timer where the client has reset the connection.
        self._unset_keepalive_if_required()
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
        if self._is_refused:
            return
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0":
            # The task that runs the application has not begun.
            self.cycle.__class__ = UnchunkedCycle

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
        self._log_cut("its request took too long to come")
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

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn where what came is not HTTP; `msg` says no more than that."""
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            self._refuse(HTTPStatus.BAD_REQUEST, MALFORMED)
        else:
            # An answer is on its way to an earlier request of this client, and cannot be taken back.
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        """Answers in place of the application, and ignores what this client still sends."""
        self._is_refused = True
        self._arrived()
        self.watch.refused(int(status), address(self.client), message)
        body = encode(status_body(status, message))
        fields = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + fields + body)
        self.transport.close()
        self._await_reader()

    def _await_reader(self) -> None:
        if self._unread is None and not self._is_lost:
            self._unread = self.loop.call_later(self.client_timeout_s, self._give_up_reader)

    def _was_read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _give_up_reader(self) -> None:
        self._unread = None
        self._log_cut("it does not read its answer")
        self.transport.abort()

    def _log_cut(self, cause: str) -> None:
        fields = {"client": address(self.client), "seconds": self.client_timeout_s}
        self.watch.lines.info("client cut off", cause, cause=cause, **fields)


def probes_alone(app: ASGIApp) -> ASGIApp:
    """The application for a connection too many: it answers probes, and refuses all other requests."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in PROBES:
            await app(scope, receive, send)
        else:
            refusal = error_response(status_body(HTTPStatus.SERVICE_UNAVAILABLE, CROWDED), {"connection": "close"})
            await refusal(scope, receive, send)

    return answer


def client_protocol(
    timeout_s: float, requests: RequestWatch | None = None, connections: int = 1 << 16
) -> type[ClientProtocol]:
    """The protocol class for uvicorn's configuration: seconds for slow clients, who is told, how many there may be."""

    class ConfiguredProtocol(ClientProtocol):
        client_timeout_s = timeout_s
        connections_max = connections
        watch = requests or RequestWatch()

    return ConfiguredProtocol


def raise_descriptor_limit() -> int:
    """Lets this process, and those that it starts, have as many files as it may; returns how many may be clients'."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Of an endless limit as much as is of use: some programs look at each descriptor that there may be.
    wanted = DESCRIPTORS_MAX if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS_MAX)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        wanted = DESCRIPTORS_MAX if soft == resource.RLIM_INFINITY else soft
    else:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(wanted - DESCRIPTORS_KEPT - PROBES_MAX, 1)


class HttpServer(uvicorn.Server):
    """A uvicorn server that leaves signals alone: `serve` handles them, as it has an engine to end before it exits.

    A TLS handshake has the seconds that a request has.
    """

    def __init__(self, config: uvicorn.Config, handshake_timeout_s: float = DEFAULT_CLIENT_TIMEOUT_S) -> None:
        super().__init__(config)
        self._handshake_timeout_s = handshake_timeout_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens on `sockets`, like uvicorn's own, which leaves each handshake the loop's 60 seconds."""
        config = self.config
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            raise StartError("The HTTP application did not start; the log says why.")

        def protocol() -> asyncio.Protocol:
            kind: Callable[..., asyncio.Protocol] = config.http_protocol_class
            return kind(config=config, server_state=self.server_state, app_state=self.lifespan.state)

        timeout: dict[str, Any] = {} if config.ssl is None else {"ssl_handshake_timeout": self._handshake_timeout_s}
        create = asyncio.get_running_loop().create_server
        self.servers = [
            await create(protocol, sock=listener, ssl=config.ssl, backlog=config.backlog, **timeout)
            for listener in sockets or []
        ]
        self.started = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Does nothing in place of uvicorn's own, which would install handlers."""
        yield
