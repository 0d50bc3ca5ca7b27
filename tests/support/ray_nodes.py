"""A Ray head that a test starts with `ray start`, to kill parts of it."""

import contextlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from actors.cluster.placement import ROWS
from benchmarks.support.ports import free_port

SECONDS = 200
START_SECONDS = 60
ATTEMPTS = 3
"""A raylet ends if its agent takes 15 s to start, as one may on a busy machine."""
RECONNECT_SECONDS = 20
"""How long Ray's processes do without the head before they end: a minute, if they are not told otherwise."""
LOOPBACK = "127.0.0.1"
BARE_NODE = ("--include-log-monitor", "false")
BARE_HEAD = ("--include-dashboard", "false", "--no-monitor")
"""Options of `ray start` without what nobody needs who joins the cluster: each is a process that imports Ray."""


class Cluster:
    """A Ray head on loopback, with its environment."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._address = f"{LOOPBACK}:{free_port()}"
        own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        once = {
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_raylet_start_wait_time_s": str(START_SECONDS),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_gcs_rpc_server_reconnect_timeout_s": str(RECONNECT_SECONDS),
        }
        self.environment: Mapping[str, str] = {**own, **once, "RAY_ADDRESS": self._address}

    def start(self, rows: int) -> None:
        """Starts the GCS and a node with so many rows; returns when they are up."""
        for _ in range(ATTEMPTS):
            port = self._address.rpartition(":")[2]
            options = ["--head", "--port", port, "--disable-usage-stats", *BARE_HEAD]
            sizes = ["--num-cpus", "1", "--object-store-memory", str(80 << 20), "--resources", json.dumps({ROWS: rows})]
            own = ["--node-ip-address", LOOPBACK, "--temp-dir", self._directory, *BARE_NODE]
            done = subprocess.run(
                [str(Path(sys.executable).with_name("ray")), "start", *options, *own, *sizes],
                env={name: value for name, value in self.environment.items() if name != "RAY_ADDRESS"},
                check=False,
                capture_output=True,
                text=True,
                timeout=SECONDS,
            )
            if done.returncode == 0:
                return
            self.end()
        raise AssertionError(done.stdout + done.stderr)

    def process(self, program: str) -> psutil.Process:
        """Returns the GCS ("gcs_server") or the raylet ("raylet")."""
        [found] = [each for each in self._processes() if Path(each.cmdline()[0]).name == program]
        return found

    def end(self) -> None:
        """Kills the processes that are left."""
        left = self._processes()
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=SECONDS)

    def _processes(self) -> list[psutil.Process]:
        """Ray's daemons, which all have the directory among their arguments."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if any(self._directory in argument for argument in process.cmdline()):
                    found.append(process)
        return found


@contextlib.contextmanager
def head_of_a_cluster(rows: int) -> Iterator[Cluster]:
    """Starts a cluster of one node with so many rows; all of it ends with the block."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as directory:
        cluster = Cluster(directory)
        try:
            cluster.start(rows)
            yield cluster
        finally:
            cluster.end()
