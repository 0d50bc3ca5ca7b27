"""What the raylet of our own Ray runs as a worker: it has a fork of the fork server become the worker in its place.

An interpreter that imports Ray and torch takes three seconds of a core; a fork of one that has done so takes moments.
The file is run by its path, and imports no more than it needs. Where no fork server answers, it becomes Ray's own
worker by itself.
"""

import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import NamedTuple

SOCKET_VARIABLE = "GALAXYLINE_FORK_SERVER"
"""The path of the fork server's socket."""

SCRIPT_VARIABLE = "GALAXYLINE_RAY_WORKER"
"""The path of Ray's own worker."""

ANSWER_SECONDS = 60.0
"""How long the fork server may take for its imports: the raylet gives a worker as long."""

STREAMS = (0, 1, 2)
LENGTH_BYTES = 8
OOM_SCORE = Path("/proc/self/oom_score_adj")
"""How readily the kernel ends this process when it wants memory: the raylet has raised it for its workers."""


class WorkerStart(NamedTuple):
    """What makes a process the worker that the raylet has started."""

    arguments: list[str]
    environment: dict[str, str]
    directory: str
    blocked_signals: list[int]
    oom_score: str
    leads_group: bool

    @classmethod
    def of_this_process(cls) -> "WorkerStart":
        """What this process was given."""
        return cls(
            arguments=sys.argv[1:],
            environment=dict(os.environ),
            directory=os.getcwd(),  # noqa: PTH109 - pathlib would have to be made a string again
            blocked_signals=sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))),
            oom_score=OOM_SCORE.read_text(encoding="ascii"),
            leads_group=os.getpgrp() == os.getpid(),
        )

    def send(self, connection: socket.socket) -> None:
        """Sends it, with this process's streams."""
        packed = json.dumps(self).encode()
        socket.send_fds(connection, [len(packed).to_bytes(LENGTH_BYTES, "big")], STREAMS)
        connection.sendall(packed)

    @classmethod
    def receive(cls, connection: socket.socket) -> "tuple[WorkerStart, list[int]]":
        """Returns what another process has sent, and its streams. Raises OSError where that is not all there."""
        length, streams, _, _ = socket.recv_fds(connection, LENGTH_BYTES, len(STREAMS))
        with connection.makefile("rb") as stream:
            packed = stream.read(int.from_bytes(length, "big"))
        if len(streams) != len(STREAMS) or len(packed) < int.from_bytes(length, "big"):
            for descriptor in streams:
                os.close(descriptor)
            raise ConnectionError("a worker ended before it had said what it is")
        return cls(*json.loads(packed)), streams

    def apply(self, streams: list[int]) -> None:
        """Makes this process, a fork of another one, what the process was that has sent it."""
        for number, descriptor in zip(STREAMS, streams, strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)
        if self.leads_group:
            os.setpgid(0, 0)
        os.chdir(self.directory)
        os.environ.clear()
        os.environ.update(self.environment)
        OOM_SCORE.write_text(self.oom_score, encoding="ascii")
        signal.pthread_sigmask(signal.SIG_SETMASK, self.blocked_signals)
        sys.argv = [self.environment[SCRIPT_VARIABLE], *self.arguments]


def is_forked(path: str) -> bool:
    """Whether the fork server at `path` has made a worker in place of this process."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(ANSWER_SECONDS)
        try:
            connection.connect(path)
            WorkerStart.of_this_process().send(connection)
            return bool(connection.recv(1))
        except OSError:
            return False


def main() -> None:
    """Ends as soon as there is a fork; else becomes Ray's worker."""
    if not is_forked(os.environ[SOCKET_VARIABLE]):
        os.execv(sys.executable, [sys.executable, os.environ[SCRIPT_VARIABLE], *sys.argv[1:]])  # noqa: S606 # nosec B606 # what the raylet would have run


if __name__ == "__main__":
    main()
