"""A Galaxy as tt-metal sees it: which chips of a host its rows are, and how the meshes of a pipeline are linked."""

from collections.abc import Iterator, Sequence

from actors.errors import PlacementError
from stages.wormhole import GALAXY_COLUMNS, GALAXY_ROWS, LINKS

VISIBLE_DEVICES = "TT_VISIBLE_DEVICES"
TRAY_ROWS = GALAXY_ROWS // 2
TRAY_COLUMNS = GALAXY_COLUMNS // 2
TRAY_BUSES = ((0xC0, 0x40), (0x00, 0x80))
"""For the trays, which lie 2 x 2, the bus before that of the first chip. tt-metal distinguishes the trays of a Wormhole
Galaxy by these (`ubb_bus_ids` in its cluster.cpp), and the chips on a tray by the last digit, which begins at 1."""
TOP = 'top_level_instance { graph { graph_descriptor: "G0" graph_id: 0 } }'


def visible_devices(rows: Sequence[int]) -> str:
    """Returns the value of TT_VISIBLE_DEVICES with which a process sees the chips of `rows` alone.

    The chips are named by their addresses on the PCI bus, which the driver takes and which, unlike its numbers of
    chips, depend on nothing else that a host has. Raises PlacementError for rows beyond the one Galaxy of a host.
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


def mesh_graph_descriptor(meshes: int, rows: int) -> str:
    """Returns tt-metal's description, a textproto, of a line of `meshes`, each of `rows` x 8 chips, joined to the next.

    A mesh's id is its stage's index; each belongs to one process. RELAXED lets tt-metal do with fewer channels where
    some are out of order.
    """
    return "\n".join([*_mesh(rows), *_graph(meshes), TOP, ""])


def _mesh(rows: int) -> Iterator[str]:
    yield "mesh_descriptors {"
    yield '  name: "M0"'
    yield "  arch: WORMHOLE_B0"
    yield f"  device_topology {{ dims: [ {rows}, {GALAXY_COLUMNS} ] }}"
    yield "  host_topology { dims: [ 1, 1 ] }"
    yield f"  channels {{ count: {LINKS} policy: RELAXED }}"
    yield "}"


def _graph(meshes: int) -> Iterator[str]:
    yield "graph_descriptors {"
    yield '  name: "G0"'
    yield '  type: "FABRIC"'
    for mesh in range(meshes):
        yield f"  instances {{ {_mesh_of(mesh)} }}"
    for mesh in range(meshes - 1):
        yield "  connections {"
        yield f"    nodes {{ {_mesh_of(mesh)} }}"
        yield f"    nodes {{ {_mesh_of(mesh + 1)} }}"
        yield f"    channels {{ count: {LINKS} policy: RELAXED }}"
        yield "  }"
    yield "}"


def _mesh_of(mesh: int) -> str:
    return f'mesh {{ mesh_descriptor: "M0" mesh_id: {mesh} }}'
