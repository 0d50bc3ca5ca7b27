"""What has to stand in the environment before Ray is imported for the first time."""

import os
import secrets

RAY_START_SECONDS = 60
"""Ray itself gives its processes 30 s, which a busy host misses."""


def cluster_address(address: str | None) -> str | None:
    """The address of the cluster to join: the given one, else RAY_ADDRESS; None to start one on this host."""
    address = address or os.environ.get("RAY_ADDRESS") or None
    return None if address == "local" else address


def prepare(address: str | None) -> None:
    """Sets the environment for `Cluster.join(address)`; what the user has set stays.

    Stages are what the host is there for: by Ray's default niceness of 15, one that has told the engine its result
    waits until the engine has done with it. Ray refuses another patch release of Python, unless it is told that the
    minor one decides.

    Ray replaces a loopback address by the outward one unless it is told that clusters are off, as on a desktop: that
    is right for a cluster of this host alone only. And it leaves a token for its own authentication, for everybody
    to read, in the home directory unless it is given one.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL", "minor")
    os.environ.setdefault("RAY_raylet_start_wait_time_s", str(RAY_START_SECONDS))
    os.environ.setdefault("RAY_worker_niceness", "0")
    if cluster_address(address) is not None:
        return
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
