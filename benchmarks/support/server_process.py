"""Servers in processes of their own, with the processes that belong to them."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import msgspec
import psutil

READY_SECONDS = 300.0
POLL_SECONDS = 0.1
END_SECONDS = 60.0
STAGE_TITLE = "ray::StageActor"
"""The beginning of the title that Ray gives to a stage's process."""


class ServerError(Exception):
    """The server did not start, answer or end as it should."""


class ServerProcesses(msgspec.Struct, frozen=True):
    """A server that is ready: its address, and its processes, including those of all replicas."""

    url: str
    front_end: psutil.Process
    engines: list[psutil.Process]
    stages: list[psutil.Process]


@contextlib.contextmanager
def running_server(command: Sequence[str], port: int, stages: int) -> Iterator[ServerProcesses]:
    """Runs a command that serves `stages` stages at a loopback port; the block begins when the server is ready."""
    root = str(Path(__file__).parents[2])
    # Ray's workers have to find this package too.
    environment = {**os.environ, "PYTHONPATH": root}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, process)
        front_end = psutil.Process(process.pid)
        yield ServerProcesses(url, front_end, engines_of(front_end), _stages_of(url, stages))
    finally:
        end(process)


def processor_seconds(process: psutil.Process) -> float:
    """Seconds in user and kernel mode of all threads so far; the kernel counts in hundredths of a second."""
    times = process.cpu_times()
    return float(times.user + times.system)


def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    """Waits until all replicas are ready. Raises ServerError if the process ends, or after READY_SECONDS."""
    deadline = time.monotonic() + READY_SECONDS
    # One client for all: to make one takes 30 ms of a core that the server needs to start.
    with httpx.Client(base_url=url, timeout=READY_SECONDS) as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise ServerError(f"The server ended with exit code {process.returncode}; its own error is above.")
            with contextlib.suppress(httpx.TransportError):
                response = client.get("/pipeline")
                if response.is_success and all(replica["phase"] == "ready" for replica in response.json()["replicas"]):
                    return
            time.sleep(POLL_SECONDS)
    raise ServerError(f"The server was not ready within {READY_SECONDS:g} s.")


def engines_of(front_end: psutil.Process) -> list[psutil.Process]:
    """The processes of the engines."""
    return [child for child in front_end.children() if "api.engine" in child.cmdline()]


def title(process: psutil.Process) -> str:
    """The title of a process; empty if it is gone, or a zombie."""
    with contextlib.suppress(psutil.NoSuchProcess):
        command = process.cmdline()
        return command[0] if command else ""
    return ""


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process by SIGTERM. If it still runs after END_SECONDS, kills it and raises ServerError."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        raise ServerError(f"The server did not end within {END_SECONDS:g} s.") from None


def _stages_of(url: str, count: int) -> list[psutil.Process]:
    """The stages' processes by the server's own view: in a Ray cluster that it has joined they are not its children."""
    pids = [stage["pid"] for stage in httpx.get(f"{url}/pipeline", timeout=READY_SECONDS).json()["stages"]]
    if len(pids) != count or not all(pids):
        raise ServerError(f"The server has stages with the process ids {pids}; {count} stages were started.")
    return [psutil.Process(pid) for pid in pids]
