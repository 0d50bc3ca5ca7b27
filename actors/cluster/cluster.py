"""The Ray cluster that stages run on: joined where there is one, else started on this host alone.

This module imports Ray, which reads its environment at that moment: `prepare_environment` has to be called before.
"""

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import ray
import structlog

from actors.cluster.environment import cluster_address
from actors.cluster.placement import ROWS
from actors.cluster.ray_private import OwnNode, current_cluster, stop_error_listener
from actors.errors import ClusterError
from stages.step import Host, Topology

Result = TypeVar("Result")

LOOPBACK = "127.0.0.1"
OBJECT_STORE_BYTES = 80 << 20
"""Size of Ray's object store, through which hardly anything passes; it accepts no less than 75 MiB."""
REACH_SECONDS = 5.0
END_SECONDS = 1.0
CONNECT_SECONDS = 150.0
"""Twice as long as Ray's processes may take to start, and more than Ray gives a cluster to answer a driver."""

HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""What a client begins with, and its settings, none."""
HTTP2_HEADER_BYTES = 9
HTTP2_SETTINGS = 4
"""The length of a frame's header, and the type of the first frame, at its fourth byte."""


_log = structlog.get_logger()


class Cluster:
    """A connection to Ray, made by `join`.

    All of Ray's blocking calls run in one thread that lives as long as the connection, because the kernel kills Ray's
    processes when the thread that started them ends. Off the main thread Ray installs no SIGTERM handler either,
    so the process keeps its own.
    """

    def __init__(self, thread: ThreadPoolExecutor, node: OwnNode | None) -> None:
        """`node` has the processes of a Ray that was started here."""
        self._thread = thread
        self._node = node
        self._is_silent = False

    @classmethod
    async def join(cls, address: str | None, rows: int, directory: Path, fork_socket: Path | None = None) -> "Cluster":
        """Joins the cluster at `address`, or at RAY_ADDRESS, or the one this process is in; else starts one that has
        `rows` galaxy rows, on the loopback interface, with its files below `directory`.

        The workers of one that is started are forks of the fork server at `fork_socket`, if it is given. Raises
        ClusterError.
        """
        thread = ThreadPoolExecutor(1, thread_name_prefix="Ray", initializer=_block_stop_signals)
        loop = asyncio.get_running_loop()
        try:
            address = cluster_address(address)
            if address == "auto":
                address = await loop.run_in_executor(thread, current_cluster)
            if address is not None:
                await _reach(address)
            connecting = loop.run_in_executor(thread, _connect, address, rows, directory, fork_socket)
            node = await asyncio.wait_for(asyncio.shield(connecting), CONNECT_SECONDS)
        except asyncio.TimeoutError:
            thread.shutdown(wait=False)
            where = "here" if address is None else f"at {address}"
            raise ClusterError(f"Ray {where} was not ready within {CONNECT_SECONDS:g} s.") from None
        except asyncio.CancelledError:
            # Ray's start cannot be called off: let it finish, so that it can be undone.
            await cls(thread, await connecting).leave()
            raise
        except ClusterError:
            thread.shutdown(wait=False)
            raise
        _take_signals_back()
        return cls(thread, node)

    @property
    def is_ours(self) -> bool:
        """Whether `join` started it: all of it is on this host then."""
        return self._node is not None

    async def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Runs one of Ray's blocking functions in the connection's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    @property
    def is_lost(self) -> bool:
        """Whether Ray has stopped answering, or processes of the one that was started here are gone."""
        return self._is_silent or (self._node is not None and not self._node.is_alive)

    async def end(self, function: Callable[..., object], *arguments: Any) -> None:
        """Runs one of Ray's blocking functions that ends something, as long as Ray answers.

        Without its head Ray tries for half a minute each time: what is left ends with the processes, or with the job.
        """
        if self.is_lost:
            return
        ending = asyncio.ensure_future(self.call(function, *arguments))
        await asyncio.wait([ending], timeout=END_SECONDS)
        if ending.done():
            ending.result()
            return
        self._is_silent = True
        _log.warning("Ray does not answer: what runs in it is left to end with this process")

    async def topology(self) -> Topology:
        """Returns the hosts that are alive, and all rows they have, in use or not.

        Raises ClusterError where Ray does not tell them, as without its head.
        """
        return await self.call(_topology)

    async def node_id(self) -> str:
        """Returns the id of the node that this process is on."""
        return await self.call(_node_id)

    async def leave(self) -> None:
        """Leaves the cluster, and ends it if `join` started it."""
        if self._node is not None:
            # Before the node ends: a driver without one waits for it.
            await self.end(ray.shutdown)
            await asyncio.to_thread(self._node.kill)
        self._thread.shutdown(wait=False)


def _block_stop_signals() -> None:
    """Makes what this thread starts deaf to SIGTERM and SIGINT, as blocked signals are inherited.

    A service manager and a machine that shuts down send them to every process; the open requests are to end first.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})


async def _reach(address: str) -> None:
    """Raises ClusterError unless a gRPC server answers at the address; Ray itself tries for minutes before it gives up.

    The kernel takes connections for a process that is stopped, and other programs take them too: only the frame that an
    HTTP/2 server begins with (RFC 9113, 3.4) tells that there is one that works.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        await asyncio.wait_for(_greet(host.strip("[]"), int(port)), timeout=REACH_SECONDS)
    except (OSError, ValueError, EOFError, asyncio.TimeoutError) as error:
        raise ClusterError(
            f"No Ray cluster answers at {address}: give HOST:PORT of one that runs (`ray start --head`), or no address."
        ) from error


async def _greet(host: str, port: int) -> None:
    """Opens an HTTP/2 connection and waits for the server's settings. Raises OSError, EOFError or ValueError."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        if os.environ.get("RAY_USE_TLS", "0") != "0":
            return
        writer.write(HTTP2_PREFACE)
        header = await reader.readexactly(HTTP2_HEADER_BYTES)
        if header[3] != HTTP2_SETTINGS:
            raise ValueError("what answers is not an HTTP/2 server")
    finally:
        writer.close()


def _connect(address: str | None, rows: int, directory: Path, fork_socket: Path | None) -> OwnNode | None:
    """Connects to Ray, or starts it; returns the node that was started here, and is to be ended here."""
    if ray.is_initialized():
        return None
    try:
        if address is None:
            return _start_despite_load(rows, directory, fork_socket)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray raises Exception itself where its processes are not up in time
        attempt = "started" if address is None else f"joined at {address}"
        # Ray refuses other releases of itself and of Python in five lines.
        raise ClusterError(f"Ray cannot be {attempt}: {' '.join(str(error).split())}") from error
    stop_error_listener()
    return None


def _take_signals_back() -> None:
    """Puts back the process's own signal handlers: Ray calls them after its own, which aborts three seconds later."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.getsignal(number))
            signal.siginterrupt(number, False)


def _start_despite_load(rows: int, directory: Path, fork_socket: Path | None) -> OwnNode:
    """Starts Ray, and once more if its processes are not up in time.

    A raylet that has agents ends if they do not report for 15 s, which on a busy host they may need to be read from
    disk (ray-project/ray, issue 65983).
    """
    try:
        return _start(rows, directory, fork_socket)
    except ClusterError:
        raise
    except Exception as error:  # Ray raises Exception itself
        _log.warning("Ray did not start: once more", cause=" ".join(str(error).split()))
        return _start(rows, directory, fork_socket)


def _start(rows: int, directory: Path, fork_socket: Path | None) -> OwnNode:
    node = OwnNode(LOOPBACK, directory, {ROWS: rows}, OBJECT_STORE_BYTES, fork_socket)
    try:
        ray.init(address=node.address, _node_ip_address=LOOPBACK, log_to_driver=False, logging_level=logging.ERROR)
        stop_error_listener()
        _refuse_outward_address()
    except BaseException:
        ray.shutdown()
        node.kill()
        raise
    return node


def _refuse_outward_address() -> None:
    bound = {host["NodeManagerAddress"] for host in _nodes()}
    if bound != {LOOPBACK}:
        raise ClusterError(
            f"Ray bound {', '.join(sorted(bound))} instead of {LOOPBACK}: it was imported before the pipeline started."
        )


def _nodes() -> list[dict[str, Any]]:
    try:
        nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    except Exception as error:  # what Ray raises without its head is not documented
        raise ClusterError(f"Ray does not tell its hosts: {' '.join(str(error).split())}") from error
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
