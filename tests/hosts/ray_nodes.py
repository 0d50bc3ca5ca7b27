"""A Ray node on each host, with token authentication."""

import contextlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from actors.cluster.placement import ROWS
from tests.hosts.network import Host
from tests.support.ray_nodes import BARE_HEAD, BARE_NODE

PORT = 6379
SECONDS = 120
LOST_SOON = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
}
"""Ray looks for a node that is gone for half a minute; here it has no more than a loaded machine may take."""
HAS_STARTED = "Ray runtime started."


class Node:
    """A node that starts, or runs; what it says is in `log`."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log


@contextlib.contextmanager
def ray_cluster(head: Host, galaxies: Mapping[Host, int]) -> Iterator[Mapping[str, str]]:
    """The environment in which a process of the head's joins the cluster; each other host offers so many rows."""
    environment = {
        # Without what other tests of this process have told Ray, such as that its cluster has one host.
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_raylet_start_wait_time_s": str(SECONDS),
        **LOST_SOON,
    }
    address = f"{head.address}:{PORT}"
    with contextlib.ExitStack() as running:
        options = ["--head", "--port", str(PORT), *BARE_HEAD]
        wait_for([running.enter_context(_node(head, environment, *options))])
        for host, rows in galaxies.items():
            joining = _node(host, environment, "--address", address, "--resources", json.dumps({ROWS: rows}))
            # One after the other: a raylet ends itself if its agent takes 15 s to start, as several at once may.
            wait_for([running.enter_context(joining)])
        yield {**environment, "RAY_ADDRESS": address}


@contextlib.contextmanager
def _node(host: Host, environment: Mapping[str, str], *options: str) -> Iterator[Node]:
    """Ends with the context. It has its own directory for sessions, which would mix in one."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as directory:
        log = Path(directory) / "start.log"
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats"]
        own = ["--node-ip-address", host.address, "--temp-dir", directory, *BARE_NODE]
        sizes = ["--num-cpus", "1", "--object-store-memory", str(80 << 20)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                host.command(*command, *own, *sizes, *options),
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            yield Node(process, log)
        finally:
            process.terminate()
            process.wait(SECONDS)


def wait_for(nodes: Iterable[Node]) -> None:
    """Until all of them have started. Fails with what one of them says if it does not."""
    deadline = time.monotonic() + SECONDS
    for node in nodes:
        while HAS_STARTED not in (said := node.log.read_text(encoding="utf-8", errors="replace")):
            assert node.process.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.05)
