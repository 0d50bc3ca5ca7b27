"""`python -m actors.stage.fork_server`: a process that has imported what stages need, and forks workers on request.

`ForkServer` starts it with the number of its listening socket. It reads a Preparation from its standard input, and ends
when that does. It has one thread, as a fork has no others, and has not imported Ray, which reads in the environment
whose worker it is.
"""

import contextlib
import ctypes
import gc
import os
import runpy
import select
import signal
import socket
import sys

import msgspec

from actors.cluster.fork_client import LENGTH_BYTES, WorkerStart
from actors.cluster.ray_private import import_dependencies
from actors.errors import StartError
from actors.release import own_release
from actors.stage.process import Preparation, import_ahead

PR_SET_PDEATHSIG = 1
"""prctl(2): a signal when the parent ends."""

REQUEST_SECONDS = 5.0
STDIN = 0


def import_all(preparation: Preparation | None) -> None:
    """Imports what Ray and the stage's actor import and, with a preparation, what its stages compute with."""
    # What is imported is the release that this process has, whatever becomes of the files.
    own_release()
    import_dependencies()
    import actors.stage.actor  # noqa: F401, PLC0415 - imported for the forks

    if preparation is not None:
        # A stage that cannot import its runner says so itself.
        with contextlib.suppress(StartError, ImportError):
            import_ahead(preparation)


def serve(listener: socket.socket) -> tuple[WorkerStart, list[int]] | None:
    """Forks a worker of each request, until the standard input ends: returns None then.

    In a fork it returns what that is to become, and its streams.
    """
    while True:
        readable, _, _ = select.select([listener.fileno(), STDIN], [], [])
        if listener.fileno() not in readable:
            return None
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(REQUEST_SECONDS)
            try:
                start, streams = WorkerStart.receive(connection)
            except OSError:
                continue  # It has ended, or was killed: the raylet starts another one.
            if os.fork() == 0:
                listener.close()
                # From here on it is this process; one that has given up is the worker itself.
                connection.sendall(b"f")
                return start, streams
            for descriptor in streams:
                os.close(descriptor)


def run_worker(start: WorkerStart, streams: list[int]) -> None:
    """Makes this process, a fork, Ray's worker."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    start.apply(streams)
    runpy.run_path(sys.argv[0], run_name="__main__")


def main() -> None:
    """Runs the process, whose one argument is the number of the listening socket."""
    # What service managers and terminals send to all processes is for the front end.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    # So that forks that end leave nothing.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    # The imports take seconds, in which the end of the standard input is not noticed.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    length = int.from_bytes(os.read(STDIN, LENGTH_BYTES), "big")
    import_all(msgspec.msgpack.decode(os.read(STDIN, length), type=Preparation | None))
    # What is shared with the forks stays so: the cycle collector would write to all of it.
    gc.freeze()
    with socket.socket(fileno=int(sys.argv[1])) as listener:
        forked = serve(listener)
    if forked is not None:
        run_worker(*forked)


if __name__ == "__main__":
    main()
