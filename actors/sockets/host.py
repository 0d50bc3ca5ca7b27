"""Links over host sockets: unix within a host, TCP between hosts; the same code for both.

The side that connects sends; the side that listens receives and gives credits. Both send a hello first: version,
secret, epoch, names and the size of hidden states have to agree, or the connection is refused and nothing else changes.
The secret keeps out untrusted peers and leftovers of other pipelines; it travels in the clear, so the network between
the hosts of a cluster has to be trusted, as Ray's own is.
"""

import asyncio
import hmac
import socket
from collections.abc import Callable
from typing import cast

import msgspec
import structlog

from actors.errors import LinkError, ProtocolError
from actors.sockets.credits import CreditReturns, Credits
from actors.sockets.frames import BufferPool, Credit, Frame, FrameReader, Heartbeat, Hello, LinkMessage, encode
from actors.sockets.link import Arrival, LinkEvents, free_nothing
from actors.sockets.writer import FrameWriter
from stages.mesh_spec import MeshSocketSpec

BEATS = 6

"""Heartbeats within the time after which silence is a loss."""


class HeartbeatMonitor:
    """Calls `beat` at a steady rate, and `fell_silent` when nothing has come from the peer for `silence_s` seconds.

    Silence is counted in turns of this side's own loop: where this process, or the whole machine, stood still, the
    peer gets as many turns to be heard as ever. Belongs to the loop.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        silence_s: float,
        beat: Callable[[], None],
        fell_silent: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._interval_s = silence_s / BEATS
        self._beat = beat
        self._fell_silent = fell_silent
        self._missed = 0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begins to send heartbeats, and to count silent turns."""
        self._timer = self._loop.call_later(self._interval_s, self._turn)

    def heard(self) -> None:
        """Called when something has come from the peer."""
        self._missed = 0

    def stop(self) -> None:
        """Ends what `start` began."""
        if self._timer is not None:
            self._timer.cancel()

    def _turn(self) -> None:
        self._missed += 1
        if self._missed > BEATS:
            self._fell_silent()
            return
        self._beat()
        self._timer = self._loop.call_later(self._interval_s, self._turn)


HANDSHAKE_SECONDS = 5.0

SILENCE_SECONDS = 3.0

"""A process that is stopped, or a host that is gone, sends no end of file. Six heartbeats may fail to come."""

_log = structlog.get_logger()


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """What both ends of a link must agree on: `name` is this end, `peer` the other one.

    Each end considers a peer that sends nothing for `silence_s` seconds lost.
    """

    epoch: int
    secret: bytes
    name: str
    peer: str
    dtype: str
    bytes_per_token: int
    mesh: MeshSocketSpec | None = None
    silence_s: float = SILENCE_SECONDS


class HostLink(asyncio.BufferedProtocol):
    """One end of a connection, made by `connect` or a `HostListener`. It is a `Link`."""

    def __init__(self, terms: Terms, events: LinkEvents, connected: socket.socket, *, credits_given: int) -> None:
        self.peer = terms.peer
        self._terms = terms
        self._events = events
        self._credits_given = credits_given
        self._loop = asyncio.get_running_loop()
        self._reader = FrameReader(terms.bytes_per_token, BufferPool())
        self._writer = FrameWriter(self._loop, connected, self._broken)
        self._credits = Credits()
        self._returns = CreditReturns(credits_given, self._return_credits)
        self._monitor = HeartbeatMonitor(self._loop, terms.silence_s, self._beat, self._fall_silent)
        self._transport: asyncio.Transport | None = None
        self._is_closed = False
        self.received_bytes = 0
        self._joined: asyncio.Future[None] = self._loop.create_future()

    @property
    def sent_bytes(self) -> int:
        """Bytes that the socket has taken, of frames whole or in part; `received_bytes` are those that came from it."""
        return self._writer.sent_bytes

    async def joined(self) -> None:
        """Waits until both sides have sent their hello. Raises LinkError or ProtocolError."""
        try:
            await asyncio.wait_for(asyncio.shield(self._joined), HANDSHAKE_SECONDS)
        except asyncio.TimeoutError:
            self.close()
            raise LinkError(f"{self.peer} did not say hello within {HANDSHAKE_SECONDS:g} s.") from None

    def send_hello(self) -> None:
        """Sends this side's hello: at once from the side that connects, as an answer from the other."""
        terms = self._terms
        hello = Hello(
            secret=terms.secret,
            sender=terms.name,
            receiver=terms.peer,
            dtype=terms.dtype,
            bytes_per_token=terms.bytes_per_token,
            credits=self._credits_given,
            mesh=terms.mesh,
        )
        self._writer.write([memoryview(encode(hello, terms.epoch))], free_nothing)

    # Link

    def send_from_thread(self, message: LinkMessage, payload: memoryview, sent: Callable[[], None]) -> None:
        """See `Link`."""
        try:
            self._credits.take_in_thread()
        except LinkError:
            sent()
            raise
        body = payload.cast("B") if payload.nbytes else memoryview(b"")
        head = memoryview(encode(message, message.epoch, body.nbytes))
        self._check_written(self._writer.write([head, body], sent))

    async def send(self, message: LinkMessage) -> None:
        """See `Link`."""
        await self._credits.take_in_task()
        self._check_written(self._writer.write([memoryview(encode(message, message.epoch))], free_nothing))

    def post(self, message: LinkMessage) -> None:
        """See `Link`."""
        self._writer.write([memoryview(encode(message, message.epoch))], free_nothing)

    def close(self) -> None:
        """See `Link`."""
        self._end(LinkError(f"The link with {self.peer} is closed.", "closed"))

    # asyncio.BufferedProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        # uvloop's transports are not subclasses of asyncio's.
        self._transport = cast("asyncio.Transport", transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Called by the loop before each read."""
        return self._reader.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        """Called by the loop after each read."""
        self._monitor.heard()
        self.received_bytes += nbytes
        try:
            for frame in self._reader.received(nbytes):
                self._handle_frame(frame)
        except ProtocolError as error:
            _log.warning("link refused", link=self._terms.name, peer=self.peer, cause=str(error))
            self._lose(error)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the loop at end of file, on a reset, or after our own close."""
        self._lose(self._loss(str(exc or "it closed the connection")))

    def _broken(self, error: OSError) -> None:
        self._lose(self._loss(str(error.strerror)))

    def _check_written(self, is_written: bool) -> None:
        if not is_written:
            raise self._loss("it takes no more")

    def _loss(self, cause: str) -> LinkError:
        return LinkError(f"lost the link {'from' if self._credits_given else 'to'} {self.peer}: {cause}", "lost")

    def _handle_frame(self, frame: Frame) -> None:
        control = frame.control
        if isinstance(control, Hello):
            self._check_hello(control, frame.epoch)
            if self._credits_given:
                self.send_hello()
            # After our own hello, so that both ends can report what they do not agree on.
            self._check_mesh(control)
            self._reader.established()
            self._credits.grant(control.credits)
            self._joined.set_result(None)
            self._monitor.start()
        elif isinstance(control, Credit):
            self._credits.grant(control.count)
        elif isinstance(control, Heartbeat):
            return
        elif frame.epoch != self._terms.epoch or control.epoch != frame.epoch:
            frame.lease.release()
            self._returns.arrived(control)
            self._returns.released(control)
        else:
            self._returns.arrived(control)
            self._events.arrived(self._arrival(control, frame))

    def _arrival(self, message: LinkMessage, frame: Frame) -> Arrival:
        def release() -> None:
            frame.lease.release()
            self._returns.released(message)

        return Arrival(message, frame.lease.view, release)

    def _check_hello(self, hello: Hello, epoch: int) -> None:
        terms = self._terms
        if not hmac.compare_digest(hello.secret, terms.secret):
            raise ProtocolError("The peer does not know this pipeline's secret.")
        given = (epoch, hello.sender, hello.receiver, hello.dtype, hello.bytes_per_token)
        expected = (terms.epoch, terms.peer, terms.name, terms.dtype, terms.bytes_per_token)
        if given != expected:
            raise ProtocolError(
                f"The hello (epoch, sender, receiver, dtype, bytes per token) was {given} where {expected} belongs."
            )

    def _check_mesh(self, hello: Hello) -> None:
        terms = self._terms
        if hello.mesh != terms.mesh:
            raise ProtocolError(
                f"{terms.name} and {terms.peer} do not agree on what passes between their meshes: {terms.name} has "
                f"{terms.mesh or 'none'}; {terms.peer} has {hello.mesh or 'none'}."
            )

    def _beat(self) -> None:
        self._writer.write([memoryview(encode(Heartbeat(), self._terms.epoch))], free_nothing)

    def _fall_silent(self) -> None:
        self._lose(self._loss(f"it has been silent for {self._terms.silence_s:g} s"))

    def _return_credits(self, count: int) -> None:
        self._writer.write([memoryview(encode(Credit(count=count), self._terms.epoch))], free_nothing)

    def _lose(self, error: LinkError | ProtocolError) -> None:
        if self._is_closed:
            return
        had_joined = self._joined.done()
        lost = (
            error if isinstance(error, LinkError) else LinkError(f"ended the link with {self.peer}: {error}", "refused")
        )
        if not had_joined:
            self._joined.set_exception(error)
            self._joined.exception()
        self._end(lost)
        if had_joined:
            self._events.lost(lost)

    def _end(self, error: LinkError) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._monitor.stop()
        if not self._joined.done():
            self._joined.set_exception(error)
            self._joined.exception()
        self._credits.end(error)
        self._writer.close()
        if self._transport is not None:
            self._transport.close()
