"""What a stage's process takes up of its world before ttnn is imported."""

from pathlib import Path

from actors.world.membership import Membership


def test_the_environment_names_rank_and_mesh(tmp_path: Path) -> None:
    identity = {"PMIX_RANK": "2", "PMIX_SERVER_TMPDIR": str(tmp_path)}
    membership = Membership(mesh_id=2, mesh_graph="the graph", identity=identity)
    environment = {"HOME": "/root", "TT_VISIBLE_DEVICES": "7"}

    membership.take_up(environment)

    descriptor = Path(environment.pop("TT_MESH_GRAPH_DESC_PATH"))
    assert descriptor.read_text() == "the graph"
    assert (descriptor.parent, descriptor.suffix) == (tmp_path, ".textproto")
    assert environment == {
        **identity,
        "HOME": "/root",
        "TT_VISIBLE_DEVICES": "7",
        "TT_MESH_ID": "2",
        "TT_MESH_HOST_RANK": "0",
    }
