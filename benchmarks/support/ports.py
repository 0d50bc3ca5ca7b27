"""Free ports for servers in other processes."""

import errno
import random
import socket

LOOPBACK = "127.0.0.1"
FIRST_PORT, END_PORT = 20_000, 32_768
"""A range below the ports that Linux gives to outgoing connections, and above those of Ray's workers, so that no other
process takes a port by chance in the seconds between its choice and its use."""


def free_port() -> int:
    """Returns a loopback port on which no process listens at present."""
    while True:
        port = random.randrange(FIRST_PORT, END_PORT)
        with socket.socket() as probe:
            try:
                probe.bind((LOOPBACK, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                continue
            return port
