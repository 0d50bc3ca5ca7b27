"""The mesh graph descriptor: tt-metal's description of the meshes of a pipeline and of the links between them."""

from collections.abc import Iterator

from stages.wormhole import GALAXY_COLUMNS, LINKS

TOP = 'top_level_instance { graph { graph_descriptor: "G0" graph_id: 0 } }'


def mesh_graph_descriptor(meshes: int, rows: int) -> str:
    """The textproto for a line of `meshes`, each of `rows` x 8 chips and joined to the next one.

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
