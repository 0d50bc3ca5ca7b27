"""Links between two ends in the test's process, over real sockets."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec

from actors.errors import LinkError
from actors.sockets.host import HostLink, Terms
from actors.sockets.link import Arrival
from actors.sockets.listener import Address, HostListener, UnixAddress, connect
from stages.step import Segment, Step

BYTES_PER_TOKEN = 4096
SECONDS = 20
UP = Terms(epoch=7, secret=b"secret", name="stage 1", peer="stage 0", dtype="float32", bytes_per_token=BYTES_PER_TOKEN)
DOWN = msgspec.structs.replace(UP, name="stage 0", peer="stage 1")


class Ear:
    """Keeps what a link says."""

    def __init__(self) -> None:
        self.arrivals: asyncio.Queue[Arrival] = asyncio.Queue()
        self.loss: asyncio.Future[LinkError] = asyncio.get_running_loop().create_future()

    def arrived(self, arrival: Arrival) -> None:
        self.arrivals.put_nowait(arrival)

    def lost(self, error: LinkError) -> None:
        self.loss.set_result(error)

    async def next(self) -> Arrival:
        return await asyncio.wait_for(self.arrivals.get(), SECONDS)

    async def cause(self) -> str:
        return str(await asyncio.wait_for(self.loss, SECONDS))


class Pair:
    """Two joined ends."""

    def __init__(self, sender: HostLink, receiver: HostLink, sender_ear: Ear, ear: Ear) -> None:
        self.sender = sender
        self.receiver = receiver
        self.sender_ear = sender_ear
        self.ear = ear

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()

    async def send(self, sent: Step, payload: bytes, done: Callable[[], None] = lambda: None) -> None:
        """Sends from another thread, as a stage does."""
        await asyncio.wait_for(
            asyncio.to_thread(self.sender.send_from_thread, sent, memoryview(payload), done), SECONDS
        )


@asynccontextmanager
async def paired(address: Address) -> AsyncIterator[Pair]:
    sender_ear, ear = Ear(), Ear()
    listener = HostListener.open(address, UP, ear)
    sender = await connect(listener.address, DOWN, sender_ear)
    joined = Pair(sender, await asyncio.wait_for(listener.accepted(), SECONDS), sender_ear, ear)
    try:
        yield joined
    finally:
        joined.close()


def step(step_id: int, tokens: int = 1, epoch: int = 7) -> Step:
    segment = Segment(slot=0, start=0, tokens=[1] * tokens, new_blocks=[], sample=True)
    return Step(epoch=epoch, step_id=step_id, mode="decode", segments=[segment], admissions=[], ended=[])


def hidden(step_id: int, tokens: int) -> bytes:
    return (step_id.to_bytes(4, "little") + os.urandom(BYTES_PER_TOKEN - 4)) * tokens


def open_socket(address: Address) -> socket.socket:
    if isinstance(address, UnixAddress):
        client = socket.socket(socket.AF_UNIX)
        client.connect(address.path)
    else:
        client = socket.create_connection((address.host, address.port))
    client.settimeout(SECONDS)
    return client
