"""Which chips a stage sees: those of its rows, as a Galaxy is wired."""

import pytest

from actors.errors import PlacementError
from actors.mpi.galaxy_chips import visible_devices
from tests.support.mock_galaxy.descriptors import pci_address
from tests.support.mock_galaxy.wiring import COLUMNS, ROWS


@pytest.mark.parametrize("row", range(ROWS))
def test_a_row_is_the_chips_that_are_wired_as_one(row: int) -> None:
    assert visible_devices([row]) == ",".join(pci_address(row, column) for column in range(COLUMNS))


def test_rows_follow_each_other_and_no_chip_is_seen_twice() -> None:
    every = visible_devices(range(ROWS)).split(",")

    assert every == [chip for row in range(ROWS) for chip in visible_devices([row]).split(",")]
    assert len(set(every)) == ROWS * COLUMNS


def test_a_host_has_one_galaxy() -> None:
    with pytest.raises(PlacementError, match="Rows 4 to 5 of one host are asked for, but it has one Galaxy of 4 rows"):
        visible_devices([4, 5])
