"""A pipeline over two hosts: Ray starts mpirun's daemon on the second one, and neither leaves anything behind."""

import json
import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests import ROOT
from tests.galaxy.chips import ON_CHIPS
from tests.galaxy.two_hosts import ADDRESSES, CAN_BE_MADE, PORT, SECONDS, ray_on, two_hosts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(ON_CHIPS, reason="the hosts are mocks"),
    pytest.mark.skipif(not CAN_BE_MADE, reason="hosts on one machine are root's to make, with ip, nsenter and unshare"),
]


def test_stages_of_two_hosts_are_joined_without_ssh(tmp_path: Path) -> None:
    # Settings of Ray by other tests of this process, such as a cluster of one host, are left out.
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    head = ["--head", "--include-dashboard", "false", "--port", str(PORT), "--node-ip-address", ADDRESSES[0]]
    other = ["--address", f"{ADDRESSES[0]}:{PORT}", "--node-ip-address", ADDRESSES[1]]
    with (
        tempfile.TemporaryDirectory(prefix="two-") as scratch,  # Sockets need a short path.
        two_hosts(tmp_path) as (first, second),
    ):
        with ray_on(first, environment, *head):
            dial = f"import socket; socket.create_connection(('localhost', {PORT}))"
            wait_for(first.command(sys.executable, "-c", dial))
            with ray_on(second, environment, *other):
                done = subprocess.run(
                    first.command(sys.executable, "-m", "tests.galaxy.two_hosts", str(tmp_path)),
                    env={**environment, "TMPDIR": scratch},
                    capture_output=True,
                    text=True,
                    timeout=2 * SECONDS,
                    check=False,
                )
                assert done.returncode == 0, done.stderr[-4000:]
                assert [name for name in second.processes() if name.startswith("prte")] == []
        assert first.processes() + second.processes() == []

    assert json.loads(done.stdout.splitlines()[-1]) == {"hosts": ["host-a", "host-b"]}


def wait_for(command: list[str]) -> None:
    """Waits until the command succeeds."""
    for _ in range(SECONDS):
        if subprocess.run(command, capture_output=True, timeout=SECONDS, check=False).returncode == 0:
            return
    raise TimeoutError(" ".join(command))
