"""Ports for servers that somebody else starts."""

import errno
import random
import socket

LOOPBACK = "127.0.0.1"
FIRST_PORT, END_PORT = 20_000, 32_768
"""Below those that Linux gives to outgoing connections, and above those of Ray's workers: between its choice and its
use, which may be seconds, nobody else takes the port by chance."""


def free_port() -> int:
    """A port of loopback that nobody listened on just now."""
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
