"""How links are made: the listening and the connecting end, and their addresses."""

import asyncio
import contextlib
import os
import socket
import stat
from pathlib import Path

import msgspec
import structlog

from actors.errors import LinkError, ProtocolError
from actors.sockets.host import HostLink, Terms
from actors.sockets.link import LinkEvents


class UnixAddress(msgspec.Struct, frozen=True, tag="unix"):
    """A socket file in a private directory."""

    path: str

    def __str__(self) -> str:
        return self.path


class TcpAddress(msgspec.Struct, frozen=True, tag="tcp"):
    """A host's address and port; port 0 lets the kernel choose when listening."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


Address = UnixAddress | TcpAddress

CREDITS = 8
"""Messages that may be on their way to or waiting at a stage. Two would keep it busy; as credits go back half a window
at a time, more of them means fewer wake-ups of the sender for it. They bound memory: a buffer exists for each message
that ever waited at the same time as others."""
CONNECT_SECONDS = 5.0
SOCKET_BUFFER_BYTES = 4 << 20
GREETINGS_MAX = 16
SILENT_HOST_SECONDS = 5

_log = structlog.get_logger()


class HostListener:
    """Waits at `address` for the one peer that the terms name. All other peers are refused, and logged."""

    def __init__(self, listening: socket.socket, address: Address, terms: Terms, events: LinkEvents) -> None:
        self.address = address
        self._listening = listening
        self._terms = terms
        self._events = events
        self._link: asyncio.Future[HostLink] = asyncio.get_running_loop().create_future()
        self._greetings: set[asyncio.Task[None]] = set()
        self._accepting = asyncio.create_task(self._accept())

    @classmethod
    def open(cls, address: Address, terms: Terms, events: LinkEvents) -> "HostListener":
        """Begins to listen; call it on the loop that the link is to run on.

        The directory of a unix socket is made, for this user alone, if it does not exist. Raises LinkError where the
        address cannot be used.
        """
        listening, bound = _listening_socket(address)
        return cls(listening, bound, terms, events)

    async def accepted(self) -> HostLink:
        """Waits for the peer and returns the link; the listener is closed and its socket file removed by then.

        The caller sets a deadline.
        """
        return await asyncio.shield(self._link)

    def close(self) -> None:
        """Stops listening; a link that was accepted stays."""
        self._accepting.cancel()
        for greeting in self._greetings:
            greeting.cancel()
        self._listening.close()
        if isinstance(self.address, UnixAddress):
            path = Path(self.address.path)
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                path.parent.rmdir()  # Others may still wait in it; the last one removes it.
        if not self._link.done():
            self._link.cancel()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connected, _ = await loop.sock_accept(self._listening)
            if len(self._greetings) >= GREETINGS_MAX:
                connected.close()
                continue
            greeting = asyncio.create_task(self._greet(connected))
            self._greetings.add(greeting)
            greeting.add_done_callback(self._greetings.discard)

    async def _greet(self, connected: socket.socket) -> None:
        link = await _linked(connected, self._terms, self._events, CREDITS)
        try:
            await link.joined()
        except (LinkError, ProtocolError) as error:
            _log.warning("connection refused", link=self._terms.name, peer=self._terms.peer, cause=str(error))
            return
        except asyncio.CancelledError:
            link.close()
            raise
        self._greetings.discard(asyncio.tasks.current_task())
        self._link.set_result(link)
        self.close()


async def connect(address: Address, terms: Terms, events: LinkEvents) -> HostLink:
    """Connects and shakes hands, each with its own deadline. Raises LinkError or ProtocolError naming the peer."""
    connecting = _socket(address)
    target = address.path if isinstance(address, UnixAddress) else (address.host, address.port)
    try:
        await asyncio.wait_for(asyncio.get_running_loop().sock_connect(connecting, target), CONNECT_SECONDS)
    except asyncio.TimeoutError:
        connecting.close()
        raise LinkError(f"{terms.peer} did not answer at {target} within {CONNECT_SECONDS:g} s.") from None
    except OSError as error:
        connecting.close()
        raise LinkError(f"{terms.peer} cannot be reached at {target}: {error.strerror}.") from error
    link = await _linked(connecting, terms, events, 0)
    link.send_hello()
    await link.joined()
    return link


async def _linked(connected: socket.socket, terms: Terms, events: LinkEvents, credits_given: int) -> HostLink:
    _tune(connected)
    link = HostLink(terms, events, connected, credits_given=credits_given)
    await asyncio.get_running_loop().connect_accepted_socket(lambda: link, connected)
    return link


def _socket(address: Address) -> socket.socket:
    if isinstance(address, UnixAddress):
        family = socket.AF_UNIX
    else:
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setblocking(False)
    return made


def _tune(connected: socket.socket) -> None:
    connected.setblocking(False)
    if connected.family == socket.AF_UNIX:
        # TCP tunes its own buffers; those of unix sockets keep the size that is set (the kernel caps it).
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
        return
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A host that vanishes sends no end of file: probe an idle link every second, give up on a silent one.
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, SILENT_HOST_SECONDS)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * SILENT_HOST_SECONDS)


def _listening_socket(address: Address) -> tuple[socket.socket, Address]:
    listening = _socket(address)
    try:
        if isinstance(address, UnixAddress):
            path = Path(address.path)
            private_directory(path.parent)
            listening.bind(address.path)
            path.chmod(0o600)
            bound: Address = address
        else:
            listening.bind((address.host, address.port))
            bound = TcpAddress(address.host, listening.getsockname()[1])
        listening.listen(GREETINGS_MAX)
    except LinkError:
        listening.close()
        raise
    except OSError as error:
        listening.close()
        raise LinkError(f"Cannot listen at {address}: {error.strerror}.") from error
    return listening, bound


def private_directory(path: Path) -> None:
    """Makes the directory, or checks that it is this user's and nobody else can enter. Raises LinkError."""
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) != 0o700:
        raise LinkError(f"{path} is not a private directory of this user: remove it.")
