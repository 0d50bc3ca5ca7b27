"""The wiring of Wormhole Galaxies: 4 rows of 8 chips each, with 4 channels between neighbours.

A Galaxy has four trays of eight chips. A tray is 2 x 4 chips, and the trays are 2 x 2, the right and the lower ones
turned around, so that equal edges meet: chips of the first row are numbered 0, 4, 8, 12, 13, 9, 5, 1. Galaxies stand
one above the other: row 4 is the first one of the second Galaxy.
"""

from collections.abc import Iterator
from typing import NamedTuple

ROWS = 4
COLUMNS = 8
CHIPS = ROWS * COLUMNS
TRAYS = 4
TRAY_COLUMNS = 4

UPPER_EDGE = range(4)
LEFT_EDGE = range(4, 8)
RIGHT_EDGE = range(8, 12)
LOWER_EDGE = range(12, 16)
"""The Ethernet channels of a chip's edges, in its orientation on the upper left tray."""


class Port(NamedTuple):
    """One end of a link."""

    row: int
    column: int
    channel: int


def chip_at(row: int, column: int) -> int:
    """The number of a chip in its Galaxy: its tray's number plus its index on the tray times the trays."""
    is_right, is_lower = column >= TRAY_COLUMNS, row % ROWS >= ROWS // 2
    inner_column = COLUMNS - 1 - column if is_right else column
    inner_row = ROWS - 1 - row % ROWS if is_lower else row % ROWS
    return TRAYS * (inner_row * TRAY_COLUMNS + inner_column) + is_right + 2 * is_lower


def links(rows: range) -> Iterator[tuple[Port, Port]]:
    """All links between the chips of `rows`."""
    for row in rows:
        for column in range(COLUMNS):
            if column + 1 < COLUMNS:
                for here, there in zip(_right_edge(column), _left_edge(column + 1), strict=True):
                    yield Port(row, column, here), Port(row, column + 1, there)
            if row + 1 in rows:
                for here, there in zip(_lower_edge(row), _upper_edge(row + 1), strict=True):
                    yield Port(row, column, here), Port(row + 1, column, there)


def _upper_edge(row: int) -> range:
    return UPPER_EDGE if row % ROWS < ROWS // 2 else LOWER_EDGE


def _lower_edge(row: int) -> range:
    return LOWER_EDGE if row % ROWS < ROWS // 2 else UPPER_EDGE


def _left_edge(column: int) -> range:
    return LEFT_EDGE if column < TRAY_COLUMNS else RIGHT_EDGE


def _right_edge(column: int) -> range:
    return RIGHT_EDGE if column < TRAY_COLUMNS else LEFT_EDGE
