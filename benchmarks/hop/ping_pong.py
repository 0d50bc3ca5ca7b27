"""The floor: the same bytes there and back by blocking calls on a unix socket."""

import contextlib
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from actors.stage.process import CoreShare
from benchmarks.support.peer import Pipe, answer, running_peer

TURN_SECONDS = 120
TURN = struct.Struct("<QQ")
"""The size of messages in bytes, and their number."""


class PingPong:
    """A connection to a peer that sends back every message."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected

    def one_way_seconds(self, size: int, count: int) -> list[float]:
        """Half the seconds of each of `count` round trips of `size` bytes, after one that is not counted.

        Raises BlockingIOError if the peer does not answer within `TURN_SECONDS`.
        """
        self._socket.sendall(TURN.pack(size, count + 1))
        message, received = memoryview(bytes(size)), memoryview(bytearray(size))
        times = []
        for _ in range(count + 1):
            began = time.perf_counter()
            self._socket.sendall(message)
            _fill(self._socket, received)
            times.append((time.perf_counter() - began) / 2)
        return times[1:]


@contextlib.contextmanager
def ping_pong(directory: Path, share: CoreShare) -> Iterator[PingPong]:
    """Runs the peer on the cores of `share`; its socket is in `directory`."""
    path = str(directory / "ping.sock")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        with running_peer(_send_back, share, path) as peer:
            answer(peer)
            connected, _ = listening.accept()
            with connected:
                # A timeout of Python's own would make the socket non-blocking, and add a system call to each.
                connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", TURN_SECONDS, 0))
                yield PingPong(connected)


def _send_back(pipe: Pipe, path: str) -> None:
    with socket.socket(socket.AF_UNIX) as connected:
        connected.connect(path)
        pipe.send("connected")
        turn = memoryview(bytearray(TURN.size))
        with contextlib.suppress(EOFError):
            while True:
                _fill(connected, turn)
                size, count = TURN.unpack(turn)
                message = memoryview(bytearray(size))
                for _ in range(count):
                    _fill(connected, message)
                    connected.sendall(message)


def _fill(connected: socket.socket, target: memoryview) -> None:
    filled = 0
    while filled < len(target):
        count = connected.recv_into(target[filled:])
        if not count:
            raise EOFError
        filled += count
