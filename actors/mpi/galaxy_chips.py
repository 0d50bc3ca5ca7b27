"""Which chips of a host's Galaxy its rows are, by their addresses on the PCI bus."""

from collections.abc import Sequence

from actors.errors import PlacementError
from stages.wormhole import GALAXY_COLUMNS, GALAXY_ROWS

VISIBLE_DEVICES = "TT_VISIBLE_DEVICES"
TRAY_ROWS = GALAXY_ROWS // 2
TRAY_COLUMNS = GALAXY_COLUMNS // 2

TRAY_BUSES = ((0xC0, 0x40), (0x00, 0x80))
"""For the trays, which lie 2 x 2, the bus before that of the first chip. tt-metal tells the trays of a Wormhole Galaxy
by these (`ubb_bus_ids` in its cluster.cpp), and the chip on a tray by the last digit, which begins at 1."""


def visible_devices(rows: Sequence[int]) -> str:
    """The value of TT_VISIBLE_DEVICES with which a process sees the chips of `rows` alone.

    The driver takes PCI addresses, which unlike its numbers of chips depend on nothing else that a host has. Raises
    PlacementError for rows beyond the one Galaxy of a host.
    """
    if max(rows) >= GALAXY_ROWS:
        raise PlacementError(
            f"Rows {min(rows)} to {max(rows)} of one host are asked for, but it has one Galaxy of {GALAXY_ROWS} rows: "
            f"offer {GALAXY_ROWS} galaxy_rows a host, or name the chips in TT_VISIBLE_DEVICES."
        )
    return ",".join(_pci_address(row, column) for row in rows for column in range(GALAXY_COLUMNS))


def _pci_address(row: int, column: int) -> str:
    """The right and the lower trays are turned around, so that equal edges meet."""
    is_lower, is_right = row >= TRAY_ROWS, column >= TRAY_COLUMNS
    tray_row = GALAXY_ROWS - 1 - row if is_lower else row
    tray_column = GALAXY_COLUMNS - 1 - column if is_right else column
    chip = tray_row * TRAY_COLUMNS + tray_column
    return f"0000:{TRAY_BUSES[is_lower][is_right] + 1 + chip:02x}:00.0"
