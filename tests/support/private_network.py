"""A network of the test's own, with nothing but loopback in it, where no outward address can be bound."""

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

CLONE_NEWNET = 0x40000000
"""From linux/sched.h."""


@contextlib.contextmanager
def private_network() -> Iterator[None]:
    """Puts this thread, and all threads and processes that it starts, into the network. Only root may."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/proc/thread-self/ns/net").open("rb") as former:
        _check(libc.unshare(CLONE_NEWNET))
        try:
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
            yield
        finally:
            _check(libc.setns(former.fileno(), CLONE_NEWNET))


def _check(result: int) -> None:
    if result:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
