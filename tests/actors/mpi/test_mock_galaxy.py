"""Mock Galaxies: the wiring of a Galaxy, and that hosts agree on the links between them."""

import itertools
import json
import struct
from collections import Counter
from typing import Any

import pytest

from tests.support.mock_galaxy.compiler import program_that_returns
from tests.support.mock_galaxy.descriptors import cluster_descriptor, host_numbers
from tests.support.mock_galaxy.wiring import CHIPS, COLUMNS, ROWS, chip_at, links

FIRST_ROW = [0, 4, 8, 12, 13, 9, 5, 1]
"""The chips of a Galaxy's first row, as tt-metal's descriptor of a Galaxy has them wired."""


def test_a_galaxy_has_its_chips_once_each() -> None:
    chips = [chip_at(row, column) for row in range(ROWS) for column in range(COLUMNS)]

    assert sorted(chips) == list(range(CHIPS))
    assert chips[:COLUMNS] == FIRST_ROW


def test_neighbours_are_joined_by_four_channels_and_no_channel_twice() -> None:
    every = list(links(range(ROWS)))
    ports = Counter(itertools.chain.from_iterable(every))
    pairs = Counter((one.row, one.column, other.row, other.column) for one, other in every)

    assert set(ports.values()) == {1}
    assert set(pairs.values()) == {4}
    assert len(pairs) == ROWS * (COLUMNS - 1) + (ROWS - 1) * COLUMNS


@pytest.mark.parametrize("split", [1, 2, 4])
def test_hosts_see_the_same_links_between_them(split: int) -> None:
    hosts = [read(range(first, first + split)) for first in range(0, 2 * ROWS, split)]

    seen = Counter(link for host in hosts for link in remote_links(host))

    assert set(seen.values()) <= {2}
    assert len(seen) == (2 * ROWS // split - 1) * COLUMNS * 4


def test_a_hosts_chips_are_counted_without_those_of_others() -> None:
    row = [host_numbers(range(4, 5))[4, column] for column in range(COLUMNS)]

    assert row == [0, 2, 4, 6, 7, 5, 3, 1]
    assert host_numbers(range(ROWS)) == {
        (row, column): chip_at(row, column) for row in range(ROWS) for column in range(COLUMNS)
    }


def test_the_stand_in_for_kernels_is_a_risc_v_executable() -> None:
    program = program_that_returns()
    kind, machine = struct.unpack_from("<HH", program, 16)

    assert program[:5] == b"\x7fELF\x01"
    assert (kind, machine) == (2, 243)


def read(rows: range) -> dict[str, Any]:
    described: dict[str, Any] = json.loads(cluster_descriptor(rows, 2 * ROWS))
    return described


def remote_links(host: dict[str, Any]) -> list[frozenset[tuple[int, int]]]:
    """Each as the (unique id, channel) of both ends."""
    ids = host["chip_unique_ids"]
    return [
        frozenset([(ids[str(own["chip"])], own["chan"]), (other["remote_chip_id"], other["chan"])])
        for own, other in host["ethernet_connections_to_remote_devices"]
    ]
