"""How actors and their processes are ended. The module imports Ray; see `cluster`."""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Collection
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from actors.cluster.cluster import Cluster
from actors.errors import PipelineError

GONE_SECONDS = 5.0
PATIENT_SECONDS = 2.0
"""How long processes may take to end by Ray, which gives one that is stopped five seconds; then this kills them."""
GONE_POLL_SECONDS = 0.02


async def kill_actor(cluster: Cluster, actor: "ActorHandle[Any]", pid: int | None) -> None:
    """Kills an actor, whose process is `pid` if it is on this host.

    On this host the process is killed at once; Ray gives one that is stopped five seconds before it kills it.
    """
    if pid is not None:
        _kill_process(pid)
    await cluster.end(_kill, actor)


async def wait_until_gone(cluster: Cluster, pids: Collection[int]) -> None:
    """Waits until these processes of this host, which were killed by Ray, are gone. Raises PipelineError if they stay.

    Ray has not killed them where it is lost: this does so then.
    """
    began = asyncio.get_running_loop().time()
    while left := [pid for pid in pids if _exists(pid)]:
        waited_s = asyncio.get_running_loop().time() - began
        if waited_s > GONE_SECONDS:
            raise PipelineError(f"The stage processes {left} on {socket.gethostname()} did not end when killed.")
        if waited_s > PATIENT_SECONDS or cluster.is_lost:
            for pid in left:
                _kill_process(pid)
        await asyncio.sleep(GONE_POLL_SECONDS)


def _kill_process(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _kill(actor: "ActorHandle[Any]") -> None:
    ray.kill(actor, no_restart=True)


def _exists(pid: int) -> bool:
    """Whether the process runs; one that only waits for its parent to take its exit code does not."""
    try:
        # The state follows the name, which is in parentheses and may hold some: proc_pid_stat(5).
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in {"Z", "X"}
