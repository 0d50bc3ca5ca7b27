"""Hosts on one machine: network namespaces that are joined by a bridge and lead nowhere else.

Nothing is made in the machine's own namespace and nothing has a name outside, so two runs cannot meet; and everything
is gone with the processes that hold the namespaces, which end with the test's own.
"""

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

SECONDS = 60
CLONE_NEWUTS = 0x04000000
CLONE_NEWNET = 0x40000000
SPACES = {"net": CLONE_NEWNET, "uts": CLONE_NEWUTS}
"""What a host has of its own: by the kernel's numbers (sched.h), as Python has `os.setns` from 3.12 on only."""

TOOLS = ("ip", "nsenter", "ss", "unshare")
CANNOT_BE_MADE = next(
    (
        why
        for is_so, why in [
            (os.geteuid() != 0, "namespaces are root's to make"),
            *[(shutil.which(tool) is None, f"`{tool}` is not installed") for tool in TOOLS],
        ]
        if is_so
    ),
    None,
)
"""Why this machine cannot have hosts, if it cannot."""


class Host:
    """A process that holds namespaces of its own, and has a name and an address in them."""

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address
        ready = "hostname $0 && ip link set lo up && echo && exec cat"  # It ends when its standard input does.
        self._holder = subprocess.Popen(
            ["unshare", "--net", "--uts", "sh", "-c", ready, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._holder.stdout is not None
        self._is_up = self._holder.stdout.readline() == b"\n"
        self.pid = self._holder.pid

    def command(self, *arguments: str) -> list[str]:
        """The command that runs on this host."""
        return ["nsenter", "--target", str(self.pid), "--net", "--uts", *arguments]

    def run(self, *arguments: str) -> str:
        """What the command prints. Fails if it does."""
        return subprocess.run(
            self.command(*arguments), check=True, timeout=SECONDS, stdout=subprocess.PIPE, text=True
        ).stdout

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """This thread is on the host: the sockets it opens, and the threads and processes that it starts."""
        with contextlib.ExitStack() as stack:
            for space, flag in SPACES.items():
                own = stack.enter_context(Path(f"/proc/thread-self/ns/{space}").open("rb"))
                with Path(f"/proc/{self.pid}/ns/{space}").open("rb") as target:
                    _enter(target.fileno(), flag)
                stack.callback(_enter, own.fileno(), flag)
            yield

    def set_link(self, state: str) -> None:
        """Plugs the cable in ("up") or pulls it ("down")."""
        self.run("ip", "link", "set", "eth0", state)

    def processes(self) -> list[psutil.Process]:
        """All that run on this host."""
        own = Path(f"/proc/{self.pid}/ns/net").readlink()
        found = []
        for process in psutil.process_iter():
            # Of those that end meanwhile, and of zombies, there is nothing to read.
            with contextlib.suppress(OSError):
                if process.pid != self.pid and Path(f"/proc/{process.pid}/ns/net").readlink() == own:
                    found.append(process)
        return found

    def switch_off(self) -> None:
        """Ends whatever runs on the host, unasked."""
        left = self.processes()
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=SECONDS)

    def close(self) -> None:
        """Ends the host, after what still runs on it."""
        self.switch_off()
        self._holder.kill()
        self._holder.communicate()

    def check(self) -> None:
        """Fails unless the host is up."""
        assert self._is_up, f"{self.name} could not be made"


@contextlib.contextmanager
def network(names: Sequence[str]) -> Iterator[list[Host]]:
    """Hosts of these names, each with a cable to the same switch."""
    with contextlib.ExitStack() as stack:
        switch = Host("switch", "")
        stack.callback(switch.close)
        switch.check()
        switch.run("ip", "link", "add", "bridge", "type", "bridge")
        switch.run("ip", "link", "set", "bridge", "up")
        hosts = []
        for number, name in enumerate(names, start=1):
            host = Host(name, f"10.77.0.{number}")
            stack.callback(host.close)
            host.check()
            _plug_in(host, switch, f"port{number}")
            hosts.append(host)
        yield hosts


def _plug_in(host: Host, switch: Host, port: str) -> None:
    ends = [["eth0", "netns", str(host.pid)], [port, "netns", str(switch.pid)]]
    subprocess.run(["ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1]], check=True, timeout=SECONDS)
    switch.run("ip", "link", "set", port, "master", "bridge", "up")
    host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
    host.set_link("up")
    # Ray takes that address for the host's own by which it would reach the world.
    host.run("ip", "route", "add", "default", "dev", "eth0")


def _enter(descriptor: int, flag: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, flag) != 0:
        raise OSError(ctypes.get_errno(), "setns")
