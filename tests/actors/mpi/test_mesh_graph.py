"""The mesh graph descriptor: as many meshes as stages, in a line."""

import re

import pytest

from actors.mpi.mesh_graph import mesh_graph_descriptor


@pytest.mark.parametrize(("meshes", "rows"), [(1, 4), (2, 4), (4, 1), (8, 2)])
def test_meshes_stand_in_a_line(meshes: int, rows: int) -> None:
    text = mesh_graph_descriptor(meshes, rows)
    instances = re.findall(r"instances \{ mesh \{ mesh_descriptor: \"M0\" mesh_id: (\d+) \} \}", text)
    nodes = re.findall(r"nodes \{ mesh \{ mesh_descriptor: \"M0\" mesh_id: (\d+) \} \}", text)

    assert [int(mesh) for mesh in instances] == list(range(meshes))
    assert [int(mesh) for mesh in nodes] == [end for mesh in range(meshes - 1) for end in (mesh, mesh + 1)]
    assert f"device_topology {{ dims: [ {rows}, 8 ] }}" in text
    assert text.count("{") == text.count("}")
