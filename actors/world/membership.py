"""What one stage's process is told of its world, and how it takes that up before ttnn is imported."""

from collections.abc import MutableMapping
from pathlib import Path

import msgspec

WORLD_DIRECTORY = "PMIX_SERVER_TMPDIR"
"""Names mpirun's own directory on a rank's host, which goes when the world does."""


class Membership(msgspec.Struct, frozen=True, kw_only=True):
    """A stage's place in the world.

    `mesh_id` is its mesh in the `mesh_graph` (the descriptor's text). `identity` holds the variables by which MPI
    knows a rank.
    """

    mesh_id: int
    mesh_graph: str
    identity: dict[str, str]

    def take_up(self, environment: MutableMapping[str, str]) -> None:
        """Sets the variables that tt-metal and MPI read when they are loaded.

        tt-metal wants the descriptor as a file. It goes where it is removed even if this process is killed.
        """
        descriptor = Path(self.identity[WORLD_DIRECTORY]) / f"mesh_graph_{self.mesh_id}.textproto"
        descriptor.write_text(self.mesh_graph, encoding="utf-8")
        environment.update(self.identity)
        environment["TT_MESH_ID"] = str(self.mesh_id)
        # Which of the processes of this mesh: each has but one.
        environment["TT_MESH_HOST_RANK"] = "0"
        environment["TT_MESH_GRAPH_DESC_PATH"] = str(descriptor)
