"""Two hosts on one machine: network namespaces with names of their own, connected by a virtual cable.

`python -m tests.galaxy.two_hosts FOLDER` is the program on the first of them: it runs a pipeline over both, with a mock
Galaxy each, and prints its observations as one line of JSON.
"""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

from actors.cluster.environment import prepare_environment
from actors.pipeline import Pipeline
from stages.device import DEVICE_VARIABLE
from tests.galaxy import mesh_pipelines
from tests.support.mock_galaxy.wiring import ROWS

NAMES = ("host-a", "host-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 6390
SECONDS = 120
STEPS = 20
TRIES = 200

CAN_BE_MADE = os.geteuid() == 0 and all(shutil.which(tool) for tool in ("ip", "nsenter", "unshare"))
"""The mark of tests that create namespaces, for which they have to be root."""


class TestHost:
    """A host: a process that keeps its namespaces open."""

    __test__ = False

    def __init__(self, name: str, table: Path) -> None:
        ready = "mount --bind $0 /etc/hosts && hostname $1 && ip link set lo up && echo && exec sleep infinity"
        self._holder = subprocess.Popen(
            ["unshare", "--net", "--uts", "--mount", "sh", "-c", ready, str(table), name], stdout=subprocess.PIPE
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"\n"
        self.pid = self._holder.pid

    def command(self, *arguments: str) -> list[str]:
        """The command that runs `arguments` on this host."""
        return ["nsenter", "--target", str(self.pid), "--net", "--uts", "--mount", *arguments]

    def run(self, *arguments: str) -> None:
        subprocess.run(self.command(*arguments), check=True, timeout=SECONDS)

    def processes(self) -> list[str]:
        """The names of all processes on this host."""
        own = Path(f"/proc/{self.pid}/ns/net").readlink()
        found = []
        for process in psutil.process_iter(["name"]):
            # Processes that end meanwhile, and zombies, have nothing to read.
            with suppress(OSError):
                if process.pid != self.pid and Path(f"/proc/{process.pid}/ns/net").readlink() == own:
                    found.append(process.name())
        return found

    def close(self) -> None:
        self._holder.kill()
        self._holder.communicate()


@contextmanager
def two_hosts(folder: Path) -> Iterator[list[TestHost]]:
    """Creates both hosts with a cable between them."""
    table = folder / "hosts"
    lines = [f"{address} {name}" for address, name in zip(ADDRESSES, NAMES, strict=True)]
    table.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]), encoding="utf-8")
    with ExitStack() as stack:
        hosts = []
        for name in NAMES:
            hosts.append(TestHost(name, table))
            stack.callback(hosts[-1].close)
        ends = [["cable", "netns", str(host.pid)] for host in hosts]
        subprocess.run(["ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1]], check=True)
        for host, address in zip(hosts, ADDRESSES, strict=True):
            host.run("ip", "address", "add", f"{address}/24", "dev", "cable")
            host.run("ip", "link", "set", "cable", "up")
        yield hosts


@contextmanager
def ray_on(host: TestHost, environment: Mapping[str, str], *arguments: str) -> Iterator[None]:
    """Runs a Ray node with a Galaxy until the block ends."""
    ray = str(Path(sys.executable).with_name("ray"))
    options = ["--block", "--num-cpus", "1", "--object-store-memory", str(80 << 20), "--disable-usage-stats"]
    resources = ["--resources", json.dumps({"galaxy_rows": ROWS})]
    node = subprocess.Popen(
        host.command(ray, "start", *options, *resources, *arguments), env=environment, stdout=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        node.terminate()
        node.wait(SECONDS)


async def joined_by_all() -> None:
    """Waits for both nodes."""
    from actors.cluster.cluster import Cluster  # noqa: PLC0415 - Ray reads what `prepare_environment` set

    cluster = await Cluster.join(f"{ADDRESSES[0]}:{PORT}", ROWS, Path())
    for _ in range(TRIES):
        if len((await cluster.topology()).hosts) == len(NAMES):
            return
        await asyncio.sleep(SECONDS / TRIES)
    raise TimeoutError(f"{await cluster.topology()}")


async def run_pipeline(folder: Path) -> dict[str, object]:
    """Returns the hosts of the stages, when both ends of their socket have recorded the same calls."""
    prepare_environment(f"{ADDRESSES[0]}:{PORT}")
    await joined_by_all()
    environments = mesh_pipelines.galaxy_environments(folder)
    how = mesh_pipelines.options("plain", environments, folder, ROWS, ray_address=f"{ADDRESSES[0]}:{PORT}")
    async with mesh_pipelines.running(how) as pipeline:
        await mesh_pipelines.run_steps(pipeline, STEPS)
        await mesh_pipelines.check_transfers(pipeline, len(NAMES), STEPS)
        hosts = await stage_hosts(pipeline)
    mesh_pipelines.check_pairs(folder, len(NAMES), STEPS)
    return {"hosts": hosts}


async def stage_hosts(pipeline: Pipeline) -> list[str]:
    return [health.host for health in await pipeline.health()]


if __name__ == "__main__":
    os.environ[DEVICE_VARIABLE] = "ttnn"
    os.chdir(sys.argv[1])  # ttnn writes a folder `generated/` into the working directory.
    print(json.dumps(asyncio.run(run_pipeline(Path(sys.argv[1])))), flush=True)  # noqa: T201
