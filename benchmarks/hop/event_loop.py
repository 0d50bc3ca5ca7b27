"""The event loop carrier: the same bytes there and back through a bare event loop at either end.

It waits in epoll, reads and writes as a link does, but does not frame, decode or credit: the time of a bare hop beyond
this is that of the link.
"""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import uvloop

from actors.stage.process import CoreShare
from benchmarks.support.peer import Pipe, answer, running_peer

TURN_SECONDS = 120.0


class EventLoop:
    """A connection to a peer that sends back every message."""

    def __init__(self, pipe: Pipe, path: str) -> None:
        self._pipe = pipe
        self._path = path

    async def one_way_seconds(self, size: int, count: int) -> list[float]:
        """Half the seconds of each of `count` round trips of `size` bytes, after one that is not counted."""
        self._pipe.send(size)
        await asyncio.to_thread(answer, self._pipe)
        loop = asyncio.get_running_loop()
        transport, returning = await loop.create_unix_connection(lambda: _Returning(size, count + 1), self._path)
        try:
            times = await asyncio.wait_for(returning.times, TURN_SECONDS)
        finally:
            transport.close()
        return [(end - begin) / 2 for begin, end in itertools.pairwise(times[1:])]


@contextlib.asynccontextmanager
async def event_loop(directory: Path, share: CoreShare) -> AsyncIterator[EventLoop]:
    """Runs the peer on the cores of `share`; its socket is in `directory`."""
    path = str(directory / "loop.sock")
    with running_peer(_run_peer, share, path) as peer:
        await asyncio.to_thread(answer, peer)
        yield EventLoop(peer, path)


class _Messages(asyncio.BufferedProtocol):
    """Reads messages of one size into one buffer."""

    def __init__(self, size: int) -> None:
        self._message = memoryview(bytearray(size))
        self._filled = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not subclasses of asyncio's.
        self.transport = cast("asyncio.Transport", transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._message[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        self._filled += nbytes
        if self._filled == len(self._message):
            self._filled = 0
            self.arrived(self._message)

    def arrived(self, message: memoryview) -> None:
        """Called when a whole message has come."""
        self.transport.write(message)


class _Returning(_Messages):
    """Sends a message `count` times, each when the last one is back; `times` has the times of this."""

    def __init__(self, size: int, count: int) -> None:
        super().__init__(size)
        self._left = count
        self._times: list[float] = []
        self.times: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.arrived(self._message)

    def arrived(self, message: memoryview) -> None:
        self._times.append(time.perf_counter())
        if not self._left:
            self.times.set_result(self._times)
            return
        self._left -= 1
        self.transport.write(message)


def _run_peer(pipe: Pipe, path: str) -> None:
    uvloop.run(_send_back(pipe, path))


async def _send_back(pipe: Pipe, path: str) -> None:
    """Sends back messages of the size that the benchmark requested last."""
    loop = asyncio.get_running_loop()
    size = 0
    server = await loop.create_unix_server(lambda: _Messages(size), path)
    pipe.send("listening")
    with contextlib.suppress(EOFError):
        while True:
            size = await asyncio.to_thread(pipe.recv)
            pipe.send("expecting")
    server.close()
