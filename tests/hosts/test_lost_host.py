"""A host leaves the cluster: its stages find rows elsewhere, once there are some."""

import json
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import pytest

from tests.hosts.moving import SAID
from tests.hosts.network import CANNOT_BE_MADE, network
from tests.hosts.ray_nodes import ray_cluster

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CANNOT_BE_MADE is not None, reason=f"hosts on one machine: {CANNOT_BE_MADE}"),
]

SECONDS = 60


def said(lines: Iterable[str]) -> list[Any]:
    return [json.loads(line.removeprefix(SAID)) for line in lines if line.startswith(SAID)]


def test_stages_of_a_lost_host_find_other_rows() -> None:
    with (
        network(["head", "left", "right"]) as (head, left, right),
        ray_cluster(head, {left: 2, right: 2}) as environment,
        subprocess.Popen(
            head.command(sys.executable, "-m", "tests.hosts.moving"),
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        [placed] = said([process.stdout.readline()])
        assert placed == [[["left", [0]], ["left", [1]]], [["right", [0]], ["right", [1]]]]
        right.switch_off()
        rest, _ = process.communicate("\n", timeout=2 * SECONDS)
        refused, found = said(rest.splitlines())
        assert process.returncode == 0
    assert "2 stages of 1 rows need 2 Galaxy rows, and they were not free" in refused
    assert "the cluster has 2: left (2, 2 in use)" in refused
    assert found == [["left", [0]], ["left", [1]]]
