"""mpirun's daemons on other hosts, started by Ray instead of ssh. The module imports Ray; see `cluster`."""

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping
from typing import cast

import msgspec
import ray
import structlog
from ray.actor import ActorClass, ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.cluster.cluster import Cluster
from stages.step import Host

END_SECONDS = 5.0
NOBODY = 255
"""What ssh returns where it could not run the command."""

_log = structlog.get_logger()


class DaemonRequest(msgspec.Struct, frozen=True):
    """What an agent sends: a command of mpirun's, and the host to run it on."""

    host: str
    command: str


class DaemonActor:
    """An actor that runs one command of mpirun's on its node."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None

    async def run(self, command: str) -> int:
        """Runs the command, waits for its end, and returns its exit status."""
        # A session of its own, so that all that it starts can be ended with it.
        self._process = await asyncio.create_subprocess_shell(command, stdin=subprocess.DEVNULL, start_new_session=True)
        return await self._process.wait()

    async def end(self) -> None:
        """Kills the command and what it has started, if it still runs."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)


class Daemons:
    """Serves the agents of one mpirun at a unix socket."""

    def __init__(self, cluster: Cluster, hosts: Mapping[str, Host], path: str) -> None:
        """`hosts` are the pipeline's, by the names that mpirun uses; the socket is made at `path`."""
        self._cluster = cluster
        self._hosts = hosts
        self._path = path
        self._server: asyncio.Server | None = None
        self._actors: list[ActorHandle[DaemonActor]] = []

    async def listen(self) -> None:
        """Opens the socket for agents."""
        self._server = await asyncio.start_unix_server(self._serve, self._path)

    async def close(self) -> None:
        """Closes the socket, and ends the daemons that are left."""
        if self._server is not None:
            self._server.close()
        actors, self._actors = self._actors, []
        for actor in actors:
            with contextlib.suppress(RayError, asyncio.TimeoutError):
                await asyncio.wait_for(_ended(actor), END_SECONDS)
            await self._cluster.end(_kill, actor)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = msgspec.json.decode(await reader.readline(), type=DaemonRequest)
        status = NOBODY
        host = self._hosts.get(request.host)
        if host is None:
            _log.error("mpirun names an unknown host", host=request.host)
        else:
            try:
                status = await self._run(host, request.command)
            except RayError as error:
                _log.warning("daemon lost", host=host.name, cause=str(error))
        writer.write(f"{status}\n".encode())
        writer.close()

    async def _run(self, host: Host, command: str) -> int:
        actor = await self._cluster.call(_make, host.node_id)
        self._actors.append(actor)
        status: int = await actor.run.remote(command)
        return status


def _make(node_id: str) -> "ActorHandle[DaemonActor]":
    remote: ActorClass[DaemonActor] = ray.remote(DaemonActor)
    made = remote.options(
        num_cpus=0, max_restarts=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
    ).remote()
    return cast("ActorHandle[DaemonActor]", made)


async def _ended(actor: "ActorHandle[DaemonActor]") -> None:
    await actor.end.remote()


def _kill(actor: "ActorHandle[DaemonActor]") -> None:
    ray.kill(actor, no_restart=True)
