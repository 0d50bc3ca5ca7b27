"""What the tests of sockets share as fixtures."""

import tempfile
from collections.abc import Iterator

import pytest

from actors.sockets.listener import Address, TcpAddress, UnixAddress


@pytest.fixture(params=["unix", "tcp"])
def address(request: pytest.FixtureRequest) -> Iterator[Address]:
    """Where to listen. Unix paths have to be short, which pytest's own directories are not."""
    if request.param == "tcp":
        yield TcpAddress("127.0.0.1", 0)
        return
    with tempfile.TemporaryDirectory(prefix="link-") as parent:
        yield UnixAddress(f"{parent}/private/1.sock")
