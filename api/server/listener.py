"""The socket that the server listens on, taken before anything slow begins."""

import errno
import socket

from api.errors import OptionError

BACKLOG = 2048


def listen(host: str, port: int) -> socket.socket:
    """A listening socket on `host` and `port`; port 0 takes any free one.

    Raises OptionError where the port is in use, or the address is none of this host's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise OptionError(f"--host {host!r} is no address: {error.strerror}.") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # Without this, the port could still be lost to another server while the stages load.
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise OptionError(f"Port {port} on {host} is in use: choose another one with --port.") from error
        raise OptionError(f"Cannot listen on {host} port {port}: {error.strerror}.") from error
    listener.setblocking(False)
    return listener


def url(listener: socket.socket) -> str:
    """Where a client on this host reaches the listener."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 # nosec B104 # not bound
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
