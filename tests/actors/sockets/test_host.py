"""Links over real sockets, unix and TCP: order, credits, untrusted peers, and peers that die."""

import asyncio
import multiprocessing
import os
import re
import signal
import socket
import stat
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import pytest

from actors.errors import LinkError, ProtocolError
from actors.sockets.frames import Hello, encode
from actors.sockets.listener import CREDITS, Address, HostListener, TcpAddress, UnixAddress, connect, private_directory
from stages.mesh_spec import HiddenShard, MeshHidden, MeshSocketSpec
from stages.step import StageFailure
from tests.support.links import BYTES_PER_TOKEN, DOWN, SECONDS, UP, Ear, Pair, hidden, open_socket, paired, step
from tests.support.loops import on_uvloop

HIDDEN = MeshHidden((4, 8), HiddenShard((1, 1, 0, 896), "bfloat16"), HiddenShard((1, 1, 256, 896), "bfloat16"))


@on_uvloop
async def test_both_ends_count_the_bytes_of_whole_frames(address: Address) -> None:
    async with paired(address) as pair:
        begun = pair.sender.sent_bytes
        assert begun == pair.receiver.received_bytes > 0
        sizes = [1, 2000, 3]
        sending = asyncio.ensure_future(
            asyncio.gather(*(pair.send(step(size, size), hidden(size, size)) for size in sizes))
        )
        for _ in sizes:
            (await pair.ear.next()).release()
        await sending
        frames = [encode(step(size, size), 7, size * BYTES_PER_TOKEN) for size in sizes]
        expected = sum(map(len, frames)) + sum(sizes) * BYTES_PER_TOKEN
        assert pair.sender.sent_bytes - begun == pair.receiver.received_bytes - begun == expected


@on_uvloop
async def test_steps_arrive_in_order_with_their_hidden_states(address: Address) -> None:
    async with paired(address) as pair:
        sizes = [1, 3, 2000, 1, 1, 500, 7, 1, 1000, 2, 64, 1]
        sent = [(step(index, size), hidden(index, size)) for index, size in enumerate(sizes)]

        async def send_all() -> None:
            for message, payload in sent:
                await pair.send(message, payload)

        sending = asyncio.ensure_future(send_all())
        for message, payload in sent:
            arrival = await pair.ear.next()
            assert arrival.message == message
            assert arrival.payload == payload
            arrival.payload[0] = 1  # The receiver may write to it.
            arrival.release()
        await sending


@on_uvloop
async def test_a_payload_is_kept_until_it_is_written(address: Address) -> None:
    async with paired(address) as pair:
        large = hidden(1, 10_000)
        done = asyncio.Event()
        loop = asyncio.get_running_loop()

        def written() -> None:
            loop.call_soon_threadsafe(done.set)

        await pair.send(step(1, 10_000), large, written)
        await pair.send(step(2, 1), hidden(2, 1))
        assert (await pair.ear.next()).payload == large
        assert (await pair.ear.next()).message == step(2, 1)
        await asyncio.wait_for(done.wait(), SECONDS)


@on_uvloop
async def test_the_sender_waits_when_the_receiver_has_released_nothing(address: Address) -> None:
    async with paired(address) as pair:
        for index in range(CREDITS):
            await pair.send(step(index), hidden(index, 1))
        held = [await pair.ear.next() for _ in range(CREDITS)]
        next_one = asyncio.ensure_future(pair.send(step(99), hidden(99, 1)))
        assert await asyncio.wait({next_one}, timeout=0.1) == (set(), {next_one})
        for arrival in held:
            arrival.release()
        await next_one
        assert (await pair.ear.next()).message == step(99)


@on_uvloop
async def test_a_coroutine_waits_for_credits_too_and_may_give_up(address: Address) -> None:
    ear = Ear()
    up, down = (msgspec.structs.replace(terms, bytes_per_token=0) for terms in (UP, DOWN))
    listener = HostListener.open(address, up, ear)
    sender = await connect(listener.address, down, Ear())
    receiver = await asyncio.wait_for(listener.accepted(), SECONDS)
    for index in range(CREDITS):
        await sender.send(step(index))
    given_up, patient = (asyncio.ensure_future(sender.send(step(index))) for index in (50, 51))
    await asyncio.wait({given_up, patient}, timeout=0.1)
    given_up.cancel()
    for _ in range(CREDITS):
        (await ear.next()).release()
    await asyncio.wait_for(patient, SECONDS)
    assert (await ear.next()).message == step(51)
    sender.close()
    receiver.close()


@on_uvloop
async def test_failures_need_no_credit(address: Address) -> None:
    async with paired(address) as pair:
        for index in range(CREDITS):
            await pair.send(step(index), hidden(index, 1))
        failure = StageFailure(epoch=7, stage=0, host="h", step_id=1, kind="error", cause="broken")
        pair.sender.post(failure)
        for _ in range(CREDITS):
            await pair.ear.next()
        assert (await pair.ear.next()).message == failure


@on_uvloop
async def test_messages_of_another_epoch_are_dropped_and_their_credits_come_back(address: Address) -> None:
    async with paired(address) as pair:
        for index in range(3 * CREDITS):
            await pair.send(step(index, epoch=6), hidden(index, 1))
        await pair.send(step(1), hidden(1, 1))
        assert (await pair.ear.next()).message == step(1)
        assert pair.ear.arrivals.empty()


@on_uvloop
async def test_a_closed_peer_is_named_by_both_ends(address: Address) -> None:
    async with paired(address) as pair:
        pair.receiver.close()
        assert await pair.sender_ear.cause() == "lost the link to stage 1: it closed the connection"
        with pytest.raises(LinkError, match="stage 1"):
            await pair.send(step(1), hidden(1, 1))
        assert not pair.ear.loss.done()


@on_uvloop
async def test_what_a_socket_does_not_take_is_not_sent_though_nobody_has_noticed_the_loss_yet(address: Address) -> None:
    async with paired(address) as pair:
        with pair.sender._writer._socket.dup() as same:
            same.shutdown(socket.SHUT_WR)
        with pytest.raises(LinkError, match="lost the link to stage 1: it takes no more"):
            await pair.send(step(1), hidden(1, 1))
        with pytest.raises(LinkError, match="lost the link to stage 1"):
            await pair.sender.send(step(2))


@on_uvloop
async def test_a_sender_without_credits_is_cut_off(address: Address) -> None:
    async with paired(address) as pair:
        for index in range(CREDITS):
            await pair.send(step(index), hidden(index, 1))
        writer = pair.sender._writer
        writer.write([memoryview(encode(step(9), 7, BYTES_PER_TOKEN)), memoryview(hidden(9, 1))], lambda: None)
        assert f"more than the {CREDITS} messages" in await pair.ear.cause()
        await pair.sender_ear.cause()


@pytest.mark.parametrize(
    "wrong",
    [
        {"secret": b"guess!"},
        {"epoch": 6},
        {"name": "stage 5"},
        {"dtype": "bfloat16"},
        {"bytes_per_token": 8},
    ],
)
@on_uvloop
async def test_a_peer_with_other_terms_is_refused_and_the_right_one_still_joins(
    address: Address, wrong: dict[str, str | int | bytes]
) -> None:
    listener = HostListener.open(address, UP, Ear())
    with pytest.raises((LinkError, ProtocolError)):
        await connect(listener.address, msgspec.structs.replace(DOWN, **wrong), Ear())
    await _join_and_part(listener)


@pytest.mark.parametrize("other", [None, MeshSocketSpec.between_equals(HIDDEN, 1 << 12)])
@on_uvloop
async def test_ends_of_unlike_meshes_are_named_with_what_each_has(
    address: Address, other: MeshSocketSpec | None
) -> None:
    own = MeshSocketSpec.between_equals(HIDDEN, 1 << 14)
    listener = HostListener.open(address, msgspec.structs.replace(UP, mesh=own), Ear())
    told = f"do not agree on what passes between their meshes: stage 0 has {other or 'none'}; stage 1 has {own}."
    with pytest.raises(ProtocolError, match=re.escape(told)):
        await connect(listener.address, msgspec.structs.replace(DOWN, mesh=other), Ear())
    await _join_and_part(listener, own)


@on_uvloop
async def test_rubbish_and_silence_do_not_keep_the_right_peer_out(address: Address) -> None:
    listener = HostListener.open(address, UP, Ear())
    silent, noisy = open_socket(listener.address), open_socket(listener.address)
    noisy.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert await asyncio.wait_for(asyncio.to_thread(_received, noisy), SECONDS) == b""
    await _join_and_part(listener)
    silent.close()
    noisy.close()


@on_uvloop
async def test_another_protocol_version_is_refused(address: Address) -> None:
    listener = HostListener.open(address, UP, Ear())
    client = open_socket(listener.address)
    hello = Hello(
        secret=UP.secret, sender="stage 0", receiver="stage 1", dtype="float32", bytes_per_token=4096, credits=0
    )
    frame = bytearray(encode(hello, 7))
    frame[4] += 1
    client.sendall(frame)
    assert await asyncio.wait_for(asyncio.to_thread(_received, client), SECONDS) == b""
    client.close()
    await _join_and_part(listener)


@on_uvloop
async def test_nobody_there_is_said_with_the_name(address: Address) -> None:
    listener = HostListener.open(address, UP, Ear())
    listener.close()
    with pytest.raises(LinkError, match="stage 1 cannot be reached"):
        await connect(listener.address, DOWN, Ear())


@on_uvloop
async def test_a_peer_that_never_says_hello_is_named(address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.sockets.host.HANDSHAKE_SECONDS", 0.1)
    mute = socket.socket(socket.AF_UNIX if isinstance(address, UnixAddress) else socket.AF_INET)
    if isinstance(address, UnixAddress):
        private_directory(Path(address.path).parent)
        mute.bind(address.path)
    else:
        mute.bind((address.host, 0))
        address = TcpAddress(address.host, mute.getsockname()[1])
    mute.listen()
    with pytest.raises(LinkError, match="stage 1 did not say hello"):
        await connect(address, DOWN, Ear())
    mute.close()


@on_uvloop
async def test_a_unix_socket_is_private_and_gone_once_joined() -> None:
    with tempfile.TemporaryDirectory(prefix="link-") as parent:
        directory = Path(parent) / "private"
        path = directory / "1.sock"
        listener = HostListener.open(UnixAddress(str(path)), UP, Ear())
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        await _join_and_part(listener)
        assert not directory.exists()


@on_uvloop
async def test_a_directory_that_others_can_enter_is_not_used() -> None:
    with tempfile.TemporaryDirectory(prefix="link-") as parent:
        os.chmod(parent, 0o755)  # noqa: PTH101 - pathlib blocks as much
        with pytest.raises(LinkError, match="not a private directory"):
            HostListener.open(UnixAddress(f"{parent}/1.sock"), UP, Ear())


@on_uvloop
async def test_a_killed_peer_is_seen_at_once_and_wakes_a_waiting_sender(address: Address) -> None:
    listener_ear, ear = Ear(), Ear()
    listener = HostListener.open(address, UP, listener_ear)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_killed_peer, args=(listener.address, theirs))
    child.start()
    receiver = await asyncio.wait_for(listener.accepted(), SECONDS)
    assert (await listener_ear.next()).message == step(1)
    port: Address = await asyncio.wait_for(asyncio.to_thread(ours.recv), SECONDS)
    sender = await connect(port, msgspec.structs.replace(UP, peer="stage 2"), ear)
    pair = Pair(sender, receiver, ear, listener_ear)
    for index in range(CREDITS):
        await pair.send(step(index), hidden(index, 1))
    waiting = asyncio.ensure_future(pair.send(step(99), hidden(99, 1)))
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    assert "lost the link from stage 0" in await listener_ear.cause()
    assert "lost the link to stage 2" in await ear.cause()
    with pytest.raises(LinkError, match="stage 2"):
        await waiting
    await asyncio.to_thread(child.join)
    pair.close()


def _killed_peer(upstream: Address, pipe: "Connection[Address, None]") -> None:
    """Is stage 0 to one link and stage 2 to another, takes what comes and waits to be killed."""

    async def live() -> None:
        sender = await connect(upstream, DOWN, Ear())
        await asyncio.to_thread(sender.send_from_thread, step(1), memoryview(hidden(1, 1)), lambda: None)
        terms = msgspec.structs.replace(UP, name="stage 2", peer="stage 1")
        listener = HostListener.open(TcpAddress("127.0.0.1", 0), terms, Ear())
        pipe.send(listener.address)
        await asyncio.sleep(3 * SECONDS)

    asyncio.run(live())


async def _join_and_part(listener: HostListener, mesh: MeshSocketSpec | None = None) -> None:
    sender = await connect(listener.address, msgspec.structs.replace(DOWN, mesh=mesh), Ear())
    receiver = await asyncio.wait_for(listener.accepted(), SECONDS)
    sender.close()
    receiver.close()


def _received(client: socket.socket) -> bytes:
    try:
        return client.recv(100)
    except ConnectionResetError:
        return b""
