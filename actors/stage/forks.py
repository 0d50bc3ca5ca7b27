"""The engine's side of the fork server: a process of which the stages of our own Ray are forks.

It imports Ray and torch once for all stages and spares of a pipeline, while Ray starts.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import msgspec

from actors.cluster.fork_client import LENGTH_BYTES
from actors.options import PipelineOptions
from actors.release import child_environment
from actors.stage.process import Preparation

SOCKET = "forks"
END_SECONDS = 5.0
"""How long the kernel may take to end a process that was killed."""


class ForkServer:
    """The process, made by `start`: workers that connect to `socket` have to wait for its imports."""

    def __init__(self, process: "subprocess.Popen[bytes]", path: Path) -> None:
        self.socket = path
        self._process = process

    @classmethod
    def start(cls, options: PipelineOptions, directory: Path) -> "ForkServer":
        """Starts it for the stages of these options, with its socket in `directory`."""
        path = directory / SOCKET
        packed = msgspec.msgpack.encode(_preparation(options))
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(len(options.specs) + 1)
            process = subprocess.Popen(  # noqa: S603 - our own module
                [sys.executable, "-m", "actors.stage.fork_server", str(listener.fileno())],
                stdin=subprocess.PIPE,
                stdout=sys.__stderr__,
                pass_fds=[listener.fileno()],
                cwd=directory,
                env=child_environment(os.environ),
            )
        server = cls(process, path)
        server._send(len(packed).to_bytes(LENGTH_BYTES, "big") + packed)
        return server

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def _send(self, text: bytes) -> None:
        if self._process.stdin is not None:
            self._process.stdin.write(text)
            self._process.stdin.flush()

    def close(self) -> None:
        """Ends the process; its forks are Ray's workers, which Ray ends. May be repeated."""
        self._process.kill()
        self._process.wait(END_SECONDS)
        if self._process.stdin is not None:
            self._process.stdin.close()


def _preparation(options: PipelineOptions) -> Preparation | None:
    """What all stages import alike; nothing where the environments that imports read are not the same for all.

    In an MPI world each stage has its own.
    """
    environment = options.environment(0)
    if options.transport != "host" or any(other != environment for other in options.environments):
        return None
    return Preparation(
        device=options.cluster.device, runner=options.runner, neighbours=len(options.specs), environment=environment
    )
