"""What another user of the host can do to a running server: use its HTTP port, and nothing else.

The server is started in a directory whose modules have the names of the project's packages: they are not imported.
"""

import contextlib
import functools
import http.client
import json
import os
import pwd
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from actors.release import PACKAGES
from benchmarks.stopping import StoppedServer, server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NAME = f"gl-other-{os.getpid()}"
COMMAND = str(Path(sys.executable).with_name("galaxyline"))
SECONDS = 10
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@pytest.fixture(scope="module")
def other() -> Iterator[pwd.struct_passwd]:
    """A user of this host who is nobody else."""
    if os.geteuid() != 0 or shutil.which("useradd") is None:
        pytest.skip("only root can add a user")
    subprocess.run(["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", NAME], check=True)
    yield pwd.getpwnam(NAME)
    subprocess.run(["userdel", NAME], check=True, capture_output=True)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoppedServer]:
    """A server that is ready, started where modules lie that have the names of ours."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for name in (*PACKAGES, "api", "msgspec"):
        (folder / f"{name}.py").write_text("raise SystemExit('not ours')")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with server(
            tmp_path_factory.mktemp("cache"), "--spare", command=[str(Path(sys.executable).with_name("galaxyline"))]
        ) as started:
            started.until(started.is_ready)
            started.until(lambda: "a spare process waits" in started.log)
            yield started


class Traces:
    """Where a server can be reached: its files, its unix sockets and its ports."""

    def __init__(self, running: StoppedServer) -> None:
        self.pids = [process.pid for process in running.processes()]
        self.directories = [path for path in running.directory.rglob("*") if path.is_dir()]
        self.files = [path for path in running.directory.rglob("galaxyline-*/**/*") if not path.is_dir()]
        inodes = {inode for pid in self.pids for inode in _socket_inodes(pid)}
        self.unix_sockets = [path for inode, path in _unix_sockets() if inode in inodes and path]
        connections = [made for pid in self.pids for made in psutil.Process(pid).net_connections("tcp")]
        self.listening = {(made.laddr.ip, made.laddr.port) for made in connections if made.status == psutil.CONN_LISTEN}


def _socket_inodes(pid: int) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            target = str(descriptor.readlink())
            if target.startswith("socket:["):
                yield target.removeprefix("socket:[").rstrip("]")


def _unix_sockets() -> Iterator[tuple[str, str]]:
    """Inode and path of every unix socket of the host: proc_net(5). The path of an abstract one begins with @."""
    for line in Path("/proc/net/unix").read_text(encoding="utf-8").splitlines()[1:]:
        fields = line.split(maxsplit=7)
        yield fields[6], fields[7] if len(fields) > 7 else ""


Attempt = Callable[[], object]


def as_user(user: pwd.struct_passwd, attempts: Mapping[str, Attempt]) -> dict[str, str]:
    """Makes attempts, by name, as a user; returns what came of each: an error's name, or "done"."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(user.pw_gid)
        os.setuid(user.pw_uid)
        os.write(writing, json.dumps({name: _outcome(attempt) for name, attempt in attempts.items()}).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    outcomes: dict[str, str] = json.loads(said)
    return outcomes


def _outcome(attempt: Attempt) -> str:
    try:
        attempt()
    except OSError as error:
        return type(error).__name__
    return "done"


def _list(path: Path) -> None:
    list(path.iterdir())


def _read(path: Path) -> None:
    with path.open("rb") as file:
        file.read(1)


def _connect(path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(path)


def attempts_at(traces: Traces) -> dict[str, Attempt]:
    """All that another user might try with files, sockets and processes."""
    attempts: dict[str, Attempt] = {}
    for directory in traces.directories:
        attempts[f"list {directory}"] = functools.partial(_list, directory)
        attempts[f"write {directory}"] = (directory / "new").touch
    for file in traces.files:
        # One that waits for a writer, or a connection, is not opened for reading.
        if stat.S_ISREG(file.lstat().st_mode):
            attempts[f"read {file}"] = functools.partial(_read, file)
        attempts[f"remove {file}"] = file.unlink
    for path in traces.unix_sockets:
        attempts[f"connect to {path}"] = functools.partial(_connect, path)
    for pid in traces.pids:
        attempts[f"list the descriptors of {pid}"] = functools.partial(_list, Path(f"/proc/{pid}/fd"))
        for name in ("environ", "mem", "maps"):
            attempts[f"read the {name} of {pid}"] = functools.partial(_read, Path(f"/proc/{pid}/{name}"))
        attempts[f"send a signal to {pid}"] = functools.partial(os.kill, pid, 0)
    return attempts


def test_files_directories_sockets_and_processes_are_closed_to_others(
    other: pwd.struct_passwd, running: StoppedServer
) -> None:
    traces = Traces(running)
    assert (len(traces.directories) > 3, len(traces.files) > 10, len(traces.unix_sockets) > 3) == (True, True, True)
    assert [path for path in traces.unix_sockets if path.startswith("@")] == []
    outcomes = as_user(other, attempts_at(traces))
    assert {name: outcome for name, outcome in outcomes.items() if outcome != "PermissionError"} == {}


def test_stages_log_where_the_server_does(running: StoppedServer) -> None:
    assert [f'"stage": {stage}, "rows": [{stage}]' in running.log for stage in (0, 1)] == [True, True]


def test_ports_are_on_loopback_and_no_other_than_its_own_speaks_http(running: StoppedServer) -> None:
    listening = Traces(running).listening
    own = int(running.url.rpartition(":")[2])
    assert {address for address, _ in listening} <= LOOPBACK
    assert own in {port for _, port in listening}
    said = {port: _answer(port) for _, port in listening if port != own}
    assert set(said.values()) == {"no HTTP"}


def _answer(port: int) -> str:
    """What a port answers to a plain request: its status, or "no HTTP" where it speaks gRPC."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        connection.request("GET", "/metrics")
        return str(connection.getresponse().status)
    except http.client.HTTPException:
        return "no HTTP"
    finally:
        connection.close()
