"""Which chips a stage sees, as a Galaxy is wired, and the mesh graph: as many meshes as stages, in a line."""

import re

import pytest

from actors.errors import PlacementError
from actors.mpi.galaxy import mesh_graph_descriptor, visible_devices
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


@pytest.mark.parametrize(("meshes", "rows"), [(1, 4), (2, 4), (4, 1), (8, 2)])
def test_meshes_stand_in_a_line(meshes: int, rows: int) -> None:
    text = mesh_graph_descriptor(meshes, rows)
    instances = re.findall(r"instances \{ mesh \{ mesh_descriptor: \"M0\" mesh_id: (\d+) \} \}", text)
    nodes = re.findall(r"nodes \{ mesh \{ mesh_descriptor: \"M0\" mesh_id: (\d+) \} \}", text)

    assert [int(mesh) for mesh in instances] == list(range(meshes))
    assert [int(mesh) for mesh in nodes] == [end for mesh in range(meshes - 1) for end in (mesh, mesh + 1)]
    assert f"device_topology {{ dims: [ {rows}, 8 ] }}" in text
    assert text.count("{") == text.count("}")
