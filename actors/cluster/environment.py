"""What has to be in the environment before Ray is imported for the first time. Nothing here imports Ray."""

import os
import secrets
import sys
from collections.abc import Mapping

from actors.cluster import ray_private


def cluster_address(address: str | None) -> str | None:
    """Returns the address of the cluster to join: the given one, else RAY_ADDRESS; None to start one on this host."""
    address = address or os.environ.get("RAY_ADDRESS") or None
    return None if address == "local" else address


def starts_cluster(address: str | None, environment: Mapping[str, str]) -> bool:
    """Whether `Cluster.join(address)` starts a Ray whose workers are processes of this host's Python.

    It starts none where this process is in one already; and in a job's runtime environment there may be another Python.
    """
    ray = sys.modules.get("ray")
    is_in_one = ray is not None and ray.is_initialized()
    return cluster_address(address) is None and not is_in_one and ray_private.JOB_CONFIG_VARIABLE not in environment


def prepare_environment(address: str | None) -> None:
    """Sets the environment for `Cluster.join(address)`; what the user has set stays.

    A cluster of this host alone gets a secret token of its own. Ray would otherwise write the token of its
    authentication to the home directory, for everybody to read.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    starts_cluster = cluster_address(address) is None
    ray_private.set_environment(os.environ, is_loopback=starts_cluster)
    if starts_cluster and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
