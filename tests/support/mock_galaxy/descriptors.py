"""Cluster descriptors of mock hosts, in which tt-metal's driver describes the chips that it finds."""

import json
from typing import Any

from tests.support.mock_galaxy.wiring import COLUMNS, ROWS, TRAYS, chip_at, links

CHIP_IDS_FROM = 1 << 56
CHIP_IDS_OF_A_GALAXY = 1 << 48
BOARD_IDS_FROM = 0x100035100000000
"""The upper digits of a board's id, by which tt-metal recognises its kind."""

PCI_BUSES = (0xC0, 0x40, 0x00, 0x80)
"""For each tray, the number before the bus of its first chip."""

NOTHING_HARVESTED = {
    "noc_translation": True,
    "harvest_mask": 0,
    "dram_harvesting_mask": 0,
    "eth_harvesting_mask": 0,
    "pcie_harvesting_mask": 0,
}


def cluster_descriptor(rows: range, all_rows: int) -> str:
    """The descriptor, as JSON, which is YAML too, of a host that owns `rows` of the `all_rows` of all hosts together.

    Rows are counted through all Galaxies; those of one host are in one Galaxy. The chips of the host are linked to
    those of other hosts."""
    numbers = host_numbers(rows)
    chips = sorted(numbers.values())
    inner, outer = _connections(rows, all_rows)
    galaxy = rows.start // ROWS
    return json.dumps(
        {
            "arch": dict.fromkeys(chips, "wormhole_b0"),
            "chips": {},
            "chip_unique_ids": {number: _unique_id(*place) for place, number in numbers.items()},
            "ethernet_connections": inner,
            "ethernet_connections_to_remote_devices": outer,
            "chips_with_mmio": [{chip: index} for index, chip in enumerate(chips)],
            "harvesting": dict.fromkeys(chips, NOTHING_HARVESTED),
            "chip_to_bus_id": {number: f"{_pci_bus(*place):#06x}" for place, number in numbers.items()},
            "chip_pci_bdfs": {number: pci_address(*place) for place, number in numbers.items()},
            "boards": [[{"board_id": BOARD_IDS_FROM + galaxy}, {"board_type": "ubb"}, {"chips": chips}]],
        }
    )


def host_numbers(rows: range) -> dict[tuple[int, int], int]:
    """The host's number of the chip at each (row, column); chips that it does not own are not counted."""
    places = [(row, column) for row in rows for column in range(COLUMNS)]
    return {place: number for number, place in enumerate(sorted(places, key=lambda place: chip_at(*place)))}


def _unique_id(row: int, column: int) -> int:
    return CHIP_IDS_FROM + row // ROWS * CHIP_IDS_OF_A_GALAXY + chip_at(row, column)


def pci_address(row: int, column: int) -> str:
    """The PCI address of a chip: domain, bus, device and function."""
    return f"0000:{_pci_bus(row, column):02x}:00.0"


def _pci_bus(row: int, column: int) -> int:
    chip = chip_at(row, column)
    return PCI_BUSES[chip % TRAYS] + 1 + chip // TRAYS


def _connections(rows: range, all_rows: int) -> tuple[list[Any], list[Any]]:
    """The links between the host's own chips, and those from its chips to chips of other hosts."""
    numbers = host_numbers(rows)
    inner: list[Any] = []
    outer: list[Any] = []
    for link in links(range(all_rows)):
        own = [{"chip": numbers[port.row, port.column], "chan": port.channel} for port in link if port.row in rows]
        others = [
            {"remote_chip_id": _unique_id(port.row, port.column), "chan": port.channel}
            for port in link
            if port.row not in rows
        ]
        if not others:
            inner.append(own)
        elif own:
            outer.append([*own, *others])
    return inner, outer
