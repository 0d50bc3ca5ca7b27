"""`python -m benchmarks.stopping`: how a server ends by signals, at ten moments of its start and ten under load.

SIGINT and SIGTERM come to the front end alone, as from `kill`, or to all its processes, as a terminal, a service
manager and a machine that shuts down send them. Under load the drain is as good as none. SIGKILL comes to each kind of
process of a server that is ready; the server is ended afterwards, where that has not ended it. What is left is found by
the directory for temporary files, which each server has for itself.
"""

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import httpx
import msgspec
import psutil
from rich.table import Table

from api.client.engine_client import leave_group
from benchmarks.support.machine import Machine
from benchmarks.support.options import benchmark_command
from benchmarks.support.ports import free_port
from benchmarks.support.report import Report, Target, publish, table_of
from benchmarks.support.server_process import ServerError, title
from stages.device import Device

COMMAND = (sys.executable, "-m", "api.cli")
READY_SECONDS = 300.0
END_SECONDS = 60.0
LEFT_SECONDS = 10.0
"""How long what a killed process leaves may take to end."""
POLL_SECONDS = 0.005
SECONDS_MAX = 2.0

Whom = Literal["front end", "all"]
Way = tuple[signal.Signals, Whom]
WAYS: tuple[Way, ...] = tuple(itertools.product((signal.SIGINT, signal.SIGTERM), ("front end", "all")))
KINDS = ("front end", "engine", "stage", "spare", "gcs_server", "raylet")
STREAMS = 4
TOKENS_SEEN = (1, 2, 4, 8, 16, 32, 64, 96, 128, 160)
"""The moments under load: so many tokens have come."""


class StopRow(msgspec.Struct, frozen=True, kw_only=True):
    """One end of a server: at which moment, by which signal to whom, its exit code, its seconds, and what it left."""

    moment: str
    by: str
    whom: str
    code: int
    seconds: float
    left: list[str]


class StoppedServer:
    """A server with a directory of its own for temporary files, to be ended by a signal."""

    def __init__(self, cache: Path, *options: str, command: Sequence[str] = COMMAND) -> None:
        """Starts it with `command`; converted weights are kept in `cache`."""
        # In a short path, as sockets need one.
        self.directory = Path(tempfile.mkdtemp(prefix="gl-", dir="/tmp"))  # nosec B108 # a private one in it
        self.url = f"http://127.0.0.1:{free_port()}"
        self._log = self.directory / "server.log"
        arguments = ["serve", "--port", self.url.rpartition(":")[2], "--cache-dir", str(cache)]
        environment = {**os.environ, "TMPDIR": str(self.directory), "GALAXYLINE_LOG_LEVEL": "info"}
        environment.pop("RAY_ADDRESS", None)
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *arguments, "--shutdown-timeout", "0.01", *options],
                env=environment,
                stdout=log,
                stderr=log,
                preexec_fn=_as_in_the_foreground,  # noqa: PLW1509 - two system calls
            )
        self._front_end = psutil.Process(self.process.pid)

    @property
    def log(self) -> str:
        """What it has printed and logged so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def processes(self) -> list[psutil.Process]:
        """All processes with its directory for temporary files, whoever started them; zombies are left out."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("TMPDIR") == str(self.directory) or self._has_open(process):
                    found.append(process)
        return found

    def _has_open(self, process: psutil.Process) -> bool:
        """Whether it writes below the directory: Ray's agents have overwritten their environment with their title."""
        ours, log = str(self.directory), str(self._log)
        return any(file.path.startswith(ours) and file.path != log for file in process.open_files())

    def has_child(self, name: str) -> bool:
        """Whether a descendant has `name` in its command line."""
        with contextlib.suppress(psutil.Error):
            return any(name in " ".join(child.cmdline()) for child in self._front_end.children(recursive=True))
        return False

    def until(self, holds: Callable[[], bool]) -> None:
        """Returns when it holds. Raises ServerError where the server ends before, or after READY_SECONDS."""
        deadline = time.monotonic() + READY_SECONDS
        while not holds():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise ServerError(f"The server did not come so far:\n{self.log}")
            time.sleep(POLL_SECONDS)

    def is_ready(self) -> bool:
        """Whether it has said that it is ready."""
        return "Ready: " in self.log

    def is_listening(self) -> bool:
        """Whether its port is open."""
        with contextlib.suppress(psutil.Error):
            return any(made.status == psutil.CONN_LISTEN for made in self._front_end.net_connections("tcp"))
        return False

    def used_seconds(self) -> float:
        """Seconds of the processor that its front end has used."""
        with contextlib.suppress(psutil.Error):
            return float(sum(self._front_end.cpu_times()[:2]))
        return 0.0

    def stop(self, moment: str, way: Way) -> StopRow:
        """Sends the signal, waits for the exit, and looks at what is left."""
        number, whom = way
        began = time.monotonic()
        if whom == "front end":
            self.process.send_signal(number)
        elif number == signal.SIGINT:
            # As a terminal does: the engine has a group of its own.
            os.killpg(self.process.pid, number)
        else:
            for process in self.processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
        code = self.process.wait(END_SECONDS)
        seconds = time.monotonic() - began
        return StopRow(moment=moment, by=number.name, whom=whom, code=code, seconds=seconds, left=self.left())

    def kill(self, kind: str) -> StopRow:
        """Kills one process of a kind, and ends the server unless that has; waits until nothing is left."""
        self._of_kind(kind).kill()
        if kind in {"stage", "spare", "gcs_server", "raylet"}:
            return self.stop(f"{kind} killed", (signal.SIGTERM, "front end"))
        began = time.monotonic()
        code = self.process.wait(END_SECONDS)
        while self.left() and time.monotonic() < began + LEFT_SECONDS:
            time.sleep(POLL_SECONDS)
        seconds = time.monotonic() - began
        return StopRow(moment=f"{kind} killed", by="SIGKILL", whom=kind, code=code, seconds=seconds, left=self.left())

    def _of_kind(self, kind: str) -> psutil.Process:
        if kind == "front end":
            return self._front_end
        children = self._front_end.children(recursive=True)
        if kind == "engine":
            return next(child for child in children if "api.engine" in child.cmdline())
        if kind in {"stage", "spare"}:
            pids = {stage["pid"] for stage in httpx.get(f"{self.url}/pipeline").json()["stages"]}
            actors = [child for child in children if title(child).startswith("ray::StageActor")]
            return next(child for child in actors if (child.pid in pids) == (kind == "stage"))
        return next(child for child in children if child.name() == kind)

    def left(self) -> list[str]:
        """The processes, and the directories of our own, that are still there."""
        names = [path.name for path in self.directory.glob("galaxyline-*")]
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                names.append(f"{process.pid} {process.name()}")
        return names

    def close(self) -> None:
        """Kills what is left and removes the directory."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(END_SECONDS)
        shutil.rmtree(self.directory, ignore_errors=True)


def _as_in_the_foreground() -> None:
    """Gives a process what a shell gives a command in the foreground: a group of its own, and Ctrl-C."""
    leave_group()
    signal.signal(signal.SIGINT, signal.SIG_DFL)


Moment = tuple[str, Callable[[StoppedServer], bool]]

START_MOMENTS: tuple[Moment, ...] = (
    ("the process has begun", lambda server: server.used_seconds() > 0.02),
    ("it imports", lambda server: server.used_seconds() > 0.3),
    ("it listens", StoppedServer.is_listening),
    ("its engine has begun", lambda server: server.has_child("api.engine")),
    ("stages are being placed", lambda server: "are being placed" in server.log),
    ("Ray's head has begun", lambda server: server.has_child("gcs_server")),
    ("the raylet has begun", lambda server: server.has_child("raylet/raylet")),
    ("stages start", lambda server: "Stage 0 on" in server.log),
    ("stages load", lambda server: "loading" in server.log and "layers" in server.log),
    ("stages are joined", lambda server: "connecting" in server.log),
)


@contextlib.contextmanager
def server(cache: Path, *options: str, command: Sequence[str] = COMMAND) -> Iterator[StoppedServer]:
    """Runs a server in the block; nothing of it is left afterwards."""
    running = StoppedServer(cache, *options, command=command)
    try:
        yield running
    finally:
        running.close()


def stop_while_starting(cache: Path, moment: Moment, way: Way) -> StopRow:
    """Starts a server and ends it at a moment of its start."""
    name, has_come = moment
    with server(cache) as starting:
        starting.until(lambda: has_come(starting))
        return starting.stop(name, way)


def stop_under_load(cache: Path, tokens: int, way: Way) -> StopRow:
    """Starts a server and ends it while it streams, once so many tokens have come."""
    with server(cache) as loaded:
        loaded.until(loaded.is_ready)
        seen = threading.Semaphore(0)
        clients = [threading.Thread(target=_read, args=(loaded.url, seen)) for _ in range(STREAMS)]
        for client in clients:
            client.start()
        for _ in range(tokens):
            seen.acquire(timeout=READY_SECONDS)
        row = loaded.stop(f"{tokens} tokens have come", way)
        for client in clients:
            client.join()
        return row


def kill_one(cache: Path, kind: str, *options: str) -> StopRow:
    """Starts a server, with these options, and kills one of its processes."""
    with server(cache, "--spare", *options) as whole:
        whole.until(whole.is_ready)
        whole.until(lambda: "a spare process waits" in whole.log)
        return whole.kill(kind)


def _read(url: str, seen: threading.Semaphore) -> None:
    body = {"prompt": "San Francisco is a", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    with (
        contextlib.suppress(httpx.TransportError),
        httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=READY_SECONDS) as response,
    ):
        for line in response.iter_lines():
            if line:
                seen.release()


def measure(cache: Path, *, short: bool) -> Iterator[StopRow]:
    """Ends servers in all ways at all moments; in a short run in one way at each."""
    for place, moment in enumerate(START_MOMENTS):
        for way in _ways(place, short=short):
            yield stop_while_starting(cache, moment, way)
    for place, tokens in enumerate(TOKENS_SEEN):
        for way in _ways(place, short=short):
            yield stop_under_load(cache, tokens, way)
    for kind in KINDS:
        yield kill_one(cache, kind)


def _ways(place: int, *, short: bool) -> Sequence[Way]:
    return WAYS[place % len(WAYS) :][:1] if short else WAYS


@benchmark_command("stopping", ("embedded",))
def main(short: bool, device: Device, out: Path) -> None:
    """Measure how long a server takes to end, at which exit code, and what it leaves."""
    with tempfile.TemporaryDirectory() as cache:
        rows = list(measure(Path(cache), short=short))
    targets = [
        Target(name="seconds of the slowest end", bound=SECONDS_MAX, figure=max(row.seconds for row in rows)),
        Target(name="ends that left something", bound=0, figure=sum(bool(row.left) for row in rows)),
    ]
    report = Report(
        benchmark="stopping", device=device, short=short, machine=Machine.here(), rows=rows, targets=targets
    )
    publish(report, _table(rows), out)


def _table(rows: Sequence[StopRow]) -> Table:
    table = table_of("moment", "signal", "to", "exit code", "seconds", "left")
    for row in rows:
        table.add_row(row.moment, row.by, row.whom, str(row.code), f"{row.seconds:.2f}", ", ".join(row.left) or "-")
    return table


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.stopping")
