"""The cluster of cluster.yaml on this host: its own start commands, on loopback and other ports.

Its Python has every library, and no galaxyline.
"""

import contextlib
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from benchmarks.support.ports import free_port
from tests import ROOT
from tests.support.private_network import private_network

FILE = ROOT / "cluster.yaml"
LOOPBACK = "127.0.0.1"
START_DEADLINE = 150.0
EXIT_DEADLINE = 30.0
COMMAND_DEADLINE = 120.0
OBJECT_STORE_BYTES = 80 << 20


def read_cluster_file() -> dict[str, Any]:
    """What cluster.yaml says."""
    contents: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return contents


@dataclass(frozen=True)
class FileCluster:
    """A running head, and who may join it."""

    folder: Path
    token: str
    port: int
    dashboard: str
    head: psutil.Process

    @property
    def bin(self) -> Path:
        """The programs of the cluster's Python."""
        return self.folder / "venv" / "bin"

    @property
    def address(self) -> str:
        """Where processes join the cluster."""
        return f"{LOOPBACK}:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables of a process on a host of the cluster."""
        return host_environment(self.folder)

    def ray(self, *arguments: str) -> str:
        """Returns what a `ray job` command prints with this cluster's job server; fails if the command does."""
        done = subprocess.run(
            [self.bin / "ray", *arguments],
            env={**self.environment, "RAY_AUTH_MODE": "token", "RAY_API_SERVER_ADDRESS": self.dashboard},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=COMMAND_DEADLINE,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def job_status(self, name: str) -> str:
        """Returns what the job server gives as the status of a job, such as STOPPED; a `ray` command takes seconds."""
        headers = {"authorization": f"Bearer {self.token}"}
        # This is asked again and again, and to read the certificates for TLS takes 30 ms.
        answer = httpx.get(f"{self.dashboard}/api/jobs/{name}", headers=headers, timeout=COMMAND_DEADLINE, verify=False)
        return str(answer.raise_for_status().json()["status"])

    def our_processes(self) -> list[psutil.Process]:
        """Returns the front ends, engines and stages that run in the cluster."""
        found = []
        for process in self.head.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                command = " ".join(process.cmdline())
                if " api." in command or "StageActor" in command:
                    found.append(process)
        return found


@contextlib.contextmanager
def running_cluster() -> Iterator[FileCluster]:
    """Runs the head, with its job server ready, in a network of the test's own: see `private_network`."""
    with private_network():
        yield from _running_cluster()


def _running_cluster() -> Iterator[FileCluster]:
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # Ray's sockets need a short path.
    try:
        token = secrets.token_hex(32)
        make_host(folder, token)
        port, dashboard = free_port(), free_port()
        command = read_cluster_file()["head_start_ray_commands"][-1]
        with running_node(folder, command, port, f"--dashboard-port={dashboard}") as head:
            cluster = FileCluster(folder, token, port, f"http://{LOOPBACK}:{dashboard}", head)
            await_job_server(cluster)
            yield cluster
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def joined(cluster: FileCluster, rows: int, environment: Mapping[str, str]) -> Iterator[None]:
    """Runs a Galaxy host with `rows` rows, as cluster.yaml starts it."""
    command = read_cluster_file()["worker_start_ray_commands"][-1].replace('"galaxy_rows": 4', f'"galaxy_rows": {rows}')
    with running_node(cluster.folder, command, cluster.port, environment=environment):
        yield


@contextlib.contextmanager
def running_node(
    folder: Path, command: str, port: int, *options: str, environment: Mapping[str, str] | None = None
) -> Iterator[psutil.Process]:
    """Runs one of the file's start commands, changed where a test on one host needs it."""
    added = [
        "--block",
        f"--node-ip-address={LOOPBACK}",
        "--num-cpus=1",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        f"--dashboard-agent-listen-port={free_port()}",
        *options,
    ]
    if "--head" in command:
        added.append(f"--temp-dir={folder / 'ray'}")
    changed = command.replace("/opt/galaxyline/bin", str(folder / "venv" / "bin")).replace("6379", str(port))
    # It would log in to the other hosts.
    changed = changed.replace("--autoscaling-config=$HOME/ray_bootstrap_config.yaml", "")
    changed = changed.replace("ray start", f"exec ray start {shlex.join(added)}")
    log = folder / f"node-{secrets.token_hex(4)}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["bash", "-c", changed],
            env={**host_environment(folder), "RAY_HEAD_IP": LOOPBACK, **(environment or {})},
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        await_line(process, log, "Ray runtime started.")
        yield psutil.Process(process.pid)
    finally:
        end(process)


def make_host(folder: Path, token: str) -> None:
    """Makes what every host has: the token, and a Python with Ray but without galaxyline."""
    path = folder / ".ray" / "auth_token"
    path.parent.mkdir()
    path.touch(mode=0o600)
    path.write_text(token, encoding="utf-8")
    (folder / "tmp").mkdir()
    venv.create(folder / "venv", symlinks=True, with_pip=False)
    [packages] = (folder / "venv" / "lib").glob("*/site-packages")
    # Of a folder that is added in this way no .pth file is read, by which galaxyline may be installed.
    ours = [entry for entry in sys.path if entry.endswith("site-packages")]
    (packages / "libraries.pth").write_text("\n".join(ours), encoding="utf-8")
    program = folder / "venv" / "bin" / "ray"
    program.write_text(f"#!{program.with_name('python')}\nfrom ray.scripts.scripts import main\nmain()\n")
    program.chmod(0o700)


def host_environment(folder: Path) -> dict[str, str]:
    """Returns the environment of a login on a host, whose home is `folder`."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RAY_", "PYTHONPATH", "DEEPSEEK_V3_", "HF_MODEL", "PYTEST_"))
    }
    return {**kept, "HOME": str(folder), "TMPDIR": str(folder / "tmp"), "PYTHONUNBUFFERED": "1"}


def await_line(process: subprocess.Popen[bytes], log: Path, line: str) -> None:
    """Returns when `line` is in the log; fails with the log if the process ends or the deadline passes."""
    deadline = time.monotonic() + START_DEADLINE
    while line not in log.read_text(encoding="utf-8"):
        assert process.poll() is None, log.read_text(encoding="utf-8")
        assert time.monotonic() < deadline, log.read_text(encoding="utf-8")
        time.sleep(0.1)


def await_job_server(cluster: FileCluster) -> None:
    """Returns when the job server takes jobs."""
    deadline = time.monotonic() + START_DEADLINE
    headers = {"authorization": f"Bearer {cluster.token}"}
    with httpx.Client(base_url=cluster.dashboard, headers=headers, timeout=5) as client:
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if client.get("/api/jobs/").status_code == 200:
                    return
            time.sleep(0.1)
    raise AssertionError(f"no job server at {cluster.dashboard} after {START_DEADLINE} s")


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, as of a service that is stopped; what outlives it is killed."""
    if process.poll() is not None:
        return
    node = psutil.Process(process.pid)
    descendants = node.children(recursive=True)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(EXIT_DEADLINE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(EXIT_DEADLINE)
    _, alive = psutil.wait_procs(descendants, timeout=EXIT_DEADLINE)
    for left in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()
