"""The links of the pipeline without stages: framed, decoded and credited, from loop to loop."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import uvloop

from actors.errors import LinkError
from actors.sockets.frames import LinkMessage
from actors.sockets.host import HostLink
from actors.sockets.link import Arrival
from actors.sockets.listener import HostListener, UnixAddress, connect
from actors.stage.process import CoreShare
from benchmarks.hop.steps import BYTES_PER_TOKEN, Secret, step_of
from benchmarks.support.peer import START_SECONDS, Pipe, answer, running_peer
from stages.step import Step

TURN_SECONDS = 120.0


class BareLink:
    """A link to a peer, and one by which it returns every step with its hidden states."""

    def __init__(self, there: HostLink, back: "_Back") -> None:
        self._there = there
        self._back = back

    async def one_way_seconds(self, tokens: int, count: int) -> list[float]:
        """Half the seconds of each of `count` round trips of `tokens` tokens, after one that is not counted."""
        step, hidden = step_of(0, tokens), memoryview(bytes(tokens * BYTES_PER_TOKEN))
        returned = self._back.expect(self._there, step, hidden, count + 1)
        times = await asyncio.wait_for(returned, TURN_SECONDS)
        return [(end - begin) / 2 for begin, end in itertools.pairwise(times[1:])]


@contextlib.asynccontextmanager
async def bare_link(directory: Path, share: CoreShare) -> AsyncIterator[BareLink]:
    """Runs the peer on the cores of `share`; its sockets are in `directory`."""
    secret = Secret.new()
    there, back = (UnixAddress(str(directory / name / "link.sock")) for name in ("there", "back"))
    events = _Back()
    listener = HostListener.open(back, secret.terms("benchmark", "peer"), events)
    with running_peer(_run_peer, share, secret, there, back) as peer:
        try:
            await asyncio.to_thread(answer, peer)
            incoming = await asyncio.wait_for(listener.accepted(), START_SECONDS)
            outgoing = await connect(there, secret.terms("benchmark", "peer"), events)
            try:
                yield BareLink(outgoing, events)
            finally:
                outgoing.close()
                incoming.close()
        finally:
            listener.close()


class _Back:
    """The benchmark's end: notes when a step is back, and sends it again."""

    def expect(self, link: HostLink, step: Step, hidden: memoryview, count: int) -> "asyncio.Future[list[float]]":
        """Sends a step `count` times, each when the last one is back; the result has the times of this."""
        self._link, self._step, self._hidden, self._left = link, step, hidden, count
        self._times: list[float] = []
        self._done: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()
        self._next()
        return self._done

    def arrived(self, arrival: Arrival) -> None:
        arrival.release()
        self._next()

    def lost(self, error: LinkError) -> None:
        if not self._done.done():
            self._done.set_exception(error)

    def _next(self) -> None:
        self._times.append(time.perf_counter())
        if not self._left:
            self._done.set_result(self._times)
            return
        self._left -= 1
        _send_in_next_turn(self._link, self._step, self._hidden, _nothing)


class _Mirror:
    """The peer's end: sends what comes by one link back by the other, from the memory in which it was received."""

    def __init__(self) -> None:
        self.back: HostLink | None = None

    def arrived(self, arrival: Arrival) -> None:
        if self.back is None:
            raise RuntimeError("a step came before the link back was there")
        _send_in_next_turn(self.back, arrival.message, arrival.payload, arrival.release)

    def lost(self, error: LinkError) -> None:
        return


def _run_peer(pipe: Pipe, secret: Secret, there: UnixAddress, back: UnixAddress) -> None:
    uvloop.run(_mirror(pipe, secret, there, back))


async def _mirror(pipe: Pipe, secret: Secret, there: UnixAddress, back: UnixAddress) -> None:
    mirror = _Mirror()
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(pipe.fileno(), ended.set)
    listener = HostListener.open(there, secret.terms("peer", "benchmark"), mirror)
    mirror.back = await connect(back, secret.terms("peer", "benchmark"), mirror)
    pipe.send("connected")
    await ended.wait()
    asyncio.get_running_loop().remove_reader(pipe.fileno())
    listener.close()
    mirror.back.close()


def _send_in_next_turn(link: HostLink, message: LinkMessage, payload: memoryview, sent: Callable[[], None]) -> None:
    """Sends from the loop without ever blocking it, as only one message is under way at a time.

    uvloop reads a socket up to 32 times before it turns to the next one. Sent from the callback of one read, messages
    could go round until all credits are spent, while the socket that brings more of them waits.
    """
    asyncio.get_running_loop().call_soon(link.send_from_thread, message, payload, sent)


def _nothing() -> None:
    """Releases nothing, as the hidden states are sent again."""
