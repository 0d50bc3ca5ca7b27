"""What the kernel says of a host's TCP connections, by `ss`."""

import re
from dataclasses import dataclass

from tests.hosts.network import Host

LINE = re.compile(r"\s*\d+\s+\d+\s+(?P<here>\S+)\s+(?P<there>\S+)\s(?P<about>.*)")
MAPPED = "[::ffff:"
"""How a socket for both families shows an IPv4 address."""


@dataclass(frozen=True)
class Connection:
    """One end of an established connection: addresses as HOST:PORT, and the payload that the other end has."""

    here: str
    there: str
    acknowledged: int


def connections(host: Host) -> list[Connection]:
    """All that the host has at this moment."""
    found = []
    for line in host.run("ss", "-tinHO", "state", "established").splitlines():
        parts = LINE.match(line)
        assert parts is not None, line
        about = dict(re.findall(r"(bytes_\w+):(\d+)", parts["about"]))
        # The kernel counts what opened a connection as a byte, at the end that did; so do not rely on its sum.
        sent = int(about.get("bytes_sent", 0)) - int(about.get("bytes_retrans", 0))
        acknowledged = min(int(about.get("bytes_acked", 0)), sent)
        found.append(Connection(_address(parts["here"]), _address(parts["there"]), acknowledged))
    return found


def _address(shown: str) -> str:
    host, _, port = shown.rpartition(":")
    return f"{host.removeprefix(MAPPED).rstrip(']')}:{port}"
