"""Strangers at a stage's socket, beside a link that is at work: refused, logged, and nothing else notices."""

import asyncio
import errno
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
from structlog.testing import capture_logs

from actors.sockets.frames import HEADER
from actors.sockets.listener import GREETINGS_MAX, Address, HostListener, TcpAddress, UnixAddress, connect
from tests.support.greetings import GOOD, NEXT, REPLAYED, UNTRUSTED
from tests.support.links import DOWN, SECONDS, UP, Ear, Pair, hidden, open_socket, paired, step
from tests.support.loops import on_uvloop

TRUNCATED = {
    "nothing": b"",
    "half a header": GOOD[: HEADER.size // 2],
    "a header alone": GOOD[: HEADER.size],
    "a hello without its end": GOOD[:-1],
}


@asynccontextmanager
async def working_pair() -> AsyncIterator[Pair]:
    """A joined link, of which every test sees that it still passes steps."""
    async with paired(TcpAddress("127.0.0.1", 0)) as pair:
        await exchange(pair, 1)
        yield pair
        await exchange(pair, 2)
        assert not pair.ear.loss.done()
        assert not pair.sender_ear.loss.done()


async def exchange(pair: Pair, step_id: int) -> None:
    payload = hidden(step_id, 3)
    await pair.send(step(step_id, 3), payload)
    arrival = await pair.ear.next()
    assert (arrival.message, bytes(arrival.payload)) == (step(step_id, 3), payload)
    arrival.release()


def _target(address: Address) -> str | tuple[str, int]:
    return address.path if isinstance(address, UnixAddress) else (address.host, address.port)


async def refused(peer: socket.socket) -> None:
    """Returns when the listener has closed the connection."""

    def read() -> None:
        try:
            assert peer.recv(1) == b""
        except ConnectionResetError:
            return

    await asyncio.wait_for(asyncio.to_thread(read), SECONDS)


async def the_right_one_joins(listener: HostListener) -> None:
    down = msgspec.structs.replace(DOWN, epoch=NEXT.epoch, secret=NEXT.secret)
    sender = await connect(listener.address, down, Ear())
    receiver = await asyncio.wait_for(listener.accepted(), SECONDS)
    sender.close()
    receiver.close()


@pytest.mark.parametrize("said", list(UNTRUSTED))
@on_uvloop
async def test_an_untrusted_peer_is_refused_by_what_it_says(address: Address, said: str) -> None:
    with capture_logs() as logs:
        async with working_pair():
            listener = HostListener.open(address, NEXT, Ear())
            peer = open_socket(listener.address)
            peer.sendall(UNTRUSTED[said])
            await refused(peer)
            peer.close()
            await the_right_one_joins(listener)
    [line] = [line for line in logs if line["event"] == "connection refused"]
    assert (line["log_level"], line["link"], line["peer"]) == ("warning", NEXT.name, NEXT.peer)
    assert line["cause"]
    assert not any(secret in str(logs) for secret in ("another secret", UP.secret.decode() + "'"))


@pytest.mark.parametrize("said", list(TRUNCATED))
@on_uvloop
async def test_an_untrusted_peer_that_leaves_in_the_middle_is_logged(address: Address, said: str) -> None:
    with capture_logs() as logs:
        async with working_pair():
            listener = HostListener.open(address, NEXT, Ear())
            peer = open_socket(listener.address)
            peer.sendall(TRUNCATED[said])
            peer.close()
            await the_right_one_joins(listener)
    assert "connection refused" in [line["event"] for line in logs]


@on_uvloop
async def test_a_hello_works_once(address: Address) -> None:
    async with working_pair():
        listener = HostListener.open(address, NEXT, Ear())
        await the_right_one_joins(listener)
        # The listener is gone with its first peer: a hello that was overheard finds nobody.
        is_unix = isinstance(listener.address, UnixAddress)
        with socket.socket(socket.AF_UNIX if is_unix else socket.AF_INET) as late:
            assert late.connect_ex(_target(listener.address)) in {errno.ECONNREFUSED, errno.ENOENT}


@on_uvloop
async def test_as_many_untrusted_peers_as_there_are_do_not_keep_the_right_one_out_for_longer_than_a_greeting(
    address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.sockets.host.HANDSHAKE_SECONDS", 0.2)
    async with working_pair():
        listener = HostListener.open(address, NEXT, Ear())
        peers = [await asyncio.to_thread(open_socket, listener.address) for _ in range(2 * GREETINGS_MAX)]
        for peer in peers:
            await refused(peer)
            peer.close()
        await the_right_one_joins(listener)


@on_uvloop
async def test_a_frame_said_twice_ends_its_own_link_alone() -> None:
    """Only the peer itself could say it: a replayed hello within a link is a break of the protocol."""
    async with working_pair(), paired(TcpAddress("127.0.0.1", 0)) as other:
        other.sender._writer.write([memoryview(REPLAYED)], lambda: None)
        assert "HELLO came after the handshake" in await other.ear.cause()
