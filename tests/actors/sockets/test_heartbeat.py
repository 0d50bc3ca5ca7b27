"""A silent peer is lost, and one that merely has nothing to send is not."""

import asyncio
import socket
import tempfile
from pathlib import Path

import msgspec
import pytest

from actors.sockets.frames import HEADER, Hello, Kind, encode
from actors.sockets.host import BEATS, HeartbeatMonitor
from actors.sockets.listener import HostListener, UnixAddress, connect
from tests.support.links import DOWN, UP, Ear
from tests.support.loops import on_skipping_loop, on_uvloop, skip_time

SECONDS = 20
SILENCE_S = 0.3


class Clock:
    """A heartbeat monitor whose turns are made by the test."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.events: list[str] = []
        self.monitor = HeartbeatMonitor(
            self.loop, SILENCE_S, lambda: self.events.append("beat"), lambda: self.events.append("silent")
        )

    def turn(self) -> None:
        self.monitor._turn()

    def close(self) -> None:
        self.monitor.stop()
        self.loop.close()


@pytest.fixture
def clock() -> "Clock":
    return Clock()


def test_each_turn_beats_until_too_many_went_by_without_a_word(clock: Clock) -> None:
    for _ in range(BEATS):
        clock.turn()
    assert clock.events == ["beat"] * BEATS
    clock.turn()
    assert clock.events == ["beat"] * BEATS + ["silent"]
    clock.close()


def test_every_word_starts_the_count_anew(clock: Clock) -> None:
    for _ in range(5 * BEATS):
        clock.turn()
        clock.turn()
        clock.monitor.heard()
    assert set(clock.events) == {"beat"}
    clock.close()


@on_skipping_loop
async def test_an_idle_link_lives_on_and_beats() -> None:
    with tempfile.TemporaryDirectory(prefix="link-") as parent:
        quick = {"silence_s": SILENCE_S}
        listener = HostListener.open(
            UnixAddress(f"{parent}/private/1.sock"), msgspec.structs.replace(UP, **quick), ear := Ear()
        )
        sender = await connect(listener.address, msgspec.structs.replace(DOWN, **quick), sender_ear := Ear())
        receiver = await asyncio.wait_for(listener.accepted(), SECONDS)
        # Longer than either end would wait for a silent one.
        for _ in range(3 * BEATS):
            heard = sender.received_bytes, receiver.received_bytes
            skip_time(SILENCE_S / BEATS)
            while sender.received_bytes == heard[0] or receiver.received_bytes == heard[1]:  # noqa: ASYNC110 - sockets
                await asyncio.sleep(0)
        assert not ear.loss.done()
        assert not sender_ear.loss.done()
        sender.close()
        assert "closed the connection" in await ear.cause()
        receiver.close()


@on_uvloop
async def test_a_peer_that_says_nothing_any_more_is_lost() -> None:
    with tempfile.TemporaryDirectory(prefix="link-") as parent:
        path = f"{parent}/private/1.sock"
        listener = HostListener.open(UnixAddress(path), msgspec.structs.replace(UP, silence_s=SILENCE_S), ear := Ear())
        peer = await asyncio.to_thread(say_hello, Path(path))
        await asyncio.wait_for(listener.accepted(), SECONDS)
        assert await ear.cause() == f"lost the link from stage 0: it has been silent for {SILENCE_S:g} s"
        sent = await asyncio.to_thread(read_all, peer)
        assert kinds(sent)[0] == Kind.HELLO
        assert set(kinds(sent)[1:]) == {Kind.HEARTBEAT}


def say_hello(path: Path) -> socket.socket:
    """Returns the connection of a stage 0 that joins, and then is silent."""
    peer = socket.socket(socket.AF_UNIX)
    peer.settimeout(SECONDS)
    peer.connect(str(path))
    hello = Hello(
        secret=DOWN.secret,
        sender=DOWN.name,
        receiver=DOWN.peer,
        dtype=DOWN.dtype,
        bytes_per_token=DOWN.bytes_per_token,
        credits=0,
    )
    peer.sendall(encode(hello, DOWN.epoch))
    return peer


def read_all(peer: socket.socket) -> bytes:
    with peer:
        return b"".join(iter(lambda: peer.recv(1 << 16), b""))


def kinds(frames: bytes) -> list[int]:
    """Returns the kinds of these frames; none has a payload."""
    found = []
    while frames:
        _, _, kind, _, length, _ = HEADER.unpack_from(frames)
        found.append(kind)
        frames = frames[HEADER.size + length :]
    return found
