"""The Ray cluster that stages run on: joined where there is one, else started on this host alone.

This module imports Ray, which reads its environment at that moment: `prepare_environment` has to be called before.
"""

import asyncio
import logging
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import ray
import structlog

from actors.cluster.environment import cluster_address
from actors.cluster.placement import ROWS
from actors.cluster.ray_private import loopback_arguments, stop_error_listener
from actors.errors import ClusterError
from stages.step import Host, Topology

Result = TypeVar("Result")

LOOPBACK = "127.0.0.1"
OBJECT_STORE_BYTES = 80 << 20
"""Size of Ray's object store, through which hardly anything passes; it accepts no less than 75 MiB."""
REACH_SECONDS = 5.0


class Cluster:
    """A connection to Ray, made by `join`.

    All of Ray's blocking calls run in one thread that lives as long as the connection, because the kernel kills Ray's
    processes when the thread that started them ends. Off the main thread Ray installs no SIGTERM handler either,
    so the process keeps its own.
    """

    def __init__(self, thread: ThreadPoolExecutor, *, is_ours: bool) -> None:
        self._thread = thread
        self._is_ours = is_ours

    @classmethod
    async def join(cls, address: str | None, rows: int) -> "Cluster":
        """Joins the cluster at `address`, or at RAY_ADDRESS, or the one this process is in; else starts one that has
        `rows` galaxy rows, on the loopback interface. Raises ClusterError.
        """
        address = cluster_address(address)
        if address is not None:
            await _reach(address)
        thread = ThreadPoolExecutor(1, thread_name_prefix="Ray")
        connecting = asyncio.get_running_loop().run_in_executor(thread, _connect, address, rows)
        try:
            is_ours = await asyncio.shield(connecting)
        except asyncio.CancelledError:
            # Ray's start cannot be called off: let it finish, so that it can be undone.
            await cls(thread, is_ours=await connecting).leave()
            raise
        except ClusterError:
            thread.shutdown(wait=False)
            raise
        _take_signals_back()
        return cls(thread, is_ours=is_ours)

    async def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Runs one of Ray's blocking functions in the connection's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def topology(self) -> Topology:
        """Returns the hosts that are alive, and all rows they have, in use or not."""
        return await self.call(_topology)

    async def node_id(self) -> str:
        """Returns the id of the node that this process is on."""
        return await self.call(_node_id)

    async def leave(self) -> None:
        """Leaves the cluster, and ends it if `join` started it."""
        if self._is_ours:
            await self.call(_shut_down)
        self._thread.shutdown(wait=False)


async def _reach(address: str) -> None:
    """Raises ClusterError unless something listens at the address; Ray itself tries for a minute before it gives up."""
    if address == "auto":
        return
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host.strip("[]"), int(port)), timeout=REACH_SECONDS)
    except (OSError, ValueError, asyncio.TimeoutError) as error:
        raise ClusterError(
            f"No Ray cluster answers at {address}: give HOST:PORT of one that runs (`ray start --head`), or no address."
        ) from error
    writer.close()


def _connect(address: str | None, rows: int) -> bool:
    """Connects to Ray, or starts it; returns whether that was done here, and is to be undone here."""
    if ray.is_initialized():
        return False
    try:
        if address is None:
            _start_despite_load(rows)
        else:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray raises Exception itself where its processes are not up in time
        attempt = "started" if address is None else f"joined at {address}"
        # Ray refuses other releases of itself and of Python in five lines.
        raise ClusterError(f"Ray cannot be {attempt}: {' '.join(str(error).split())}") from error
    stop_error_listener()
    return True


def _take_signals_back() -> None:
    """Puts back the process's own signal handlers: Ray calls them after its own, which aborts three seconds later."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.getsignal(number))
            signal.siginterrupt(number, False)


def _start_despite_load(rows: int) -> None:
    """Starts Ray, and once more if its processes are not up in time.

    A raylet ends if its agents do not report for 15 s, which on a busy host they may need to be read from disk
    (ray-project/ray, issue 65983).
    """
    try:
        _start(rows)
    except ClusterError:
        raise
    except Exception as error:  # Ray raises Exception itself
        structlog.get_logger().warning("Ray did not start: once more", cause=" ".join(str(error).split()))
        _start(rows)


def _start(rows: int) -> None:
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        num_cpus=1,
        resources={ROWS: rows},
        object_store_memory=OBJECT_STORE_BYTES,
        **loopback_arguments(LOOPBACK),
    )
    bound = {node["NodeManagerAddress"] for node in _nodes()}
    if bound != {LOOPBACK}:
        ray.shutdown()
        raise ClusterError(
            f"Ray bound {', '.join(sorted(bound))} instead of {LOOPBACK}: it was imported before the pipeline started."
        )


def _nodes() -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return nodes


def _topology() -> Topology:
    hosts = [
        Host(
            node_id=node["NodeID"],
            name=node["NodeManagerHostname"],
            address=node["NodeManagerAddress"],
            rows=int(node["Resources"].get(ROWS, 0)),
        )
        for node in _nodes()
        if node["Alive"]
    ]
    return Topology(hosts=sorted(hosts, key=lambda host: (host.name, host.node_id)))


def _node_id() -> str:
    node_id: str = ray.get_runtime_context().get_node_id()
    return node_id


def _shut_down() -> None:
    ray.shutdown()
