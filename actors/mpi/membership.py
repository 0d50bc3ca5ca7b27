"""A stage's place in an MPI world, and how its process enters it before ttnn is imported."""

import os
from collections.abc import MutableMapping
from pathlib import Path

import msgspec

from actors.errors import StartError
from actors.mpi.placeholder import RANK_VARIABLE

MPI_DIRECTORY = "PMIX_SERVER_TMPDIR"
"""Names mpirun's own directory on a rank's host, which is removed when the MPI world ends."""
IDENTITY_PREFIXES = ("PMIX_", "OMPI_", "PRTE_")
"""Beginnings of the names of the variables by which MPI identifies a rank."""


class Membership(msgspec.Struct, frozen=True, kw_only=True):
    """A stage's place in the MPI world.

    `rank` is the index of the stage, and of its mesh in the `mesh_graph` (the descriptor's text). `placeholder` is the
    pid of the process that holds the rank, on the stage's host.
    """

    rank: int
    mesh_graph: str
    placeholder: int

    def apply(self, environment: MutableMapping[str, str]) -> None:
        """Sets the variables that tt-metal and MPI read when they are loaded. Raises StartError.

        tt-metal reads the descriptor from a file. It is written where it is removed even if this process is killed.
        """
        identity = self._identity()
        descriptor = Path(identity[MPI_DIRECTORY]) / f"mesh_graph_{self.rank}.textproto"
        descriptor.write_text(self.mesh_graph, encoding="utf-8")
        environment.update(identity)
        environment["TT_MESH_ID"] = str(self.rank)
        # The number of this process among those of its mesh: each mesh has one process.
        environment["TT_MESH_HOST_RANK"] = "0"
        environment["TT_MESH_GRAPH_DESC_PATH"] = str(descriptor)

    def _identity(self) -> dict[str, str]:
        """Returns the variables that mpirun gave the placeholder."""
        try:
            given = Path(f"/proc/{self.placeholder}/environ").read_bytes()
        except OSError as error:
            raise StartError(
                f"The placeholder of rank {self.rank}, process {self.placeholder}, cannot be read: {error.strerror}."
            ) from error
        variables = dict(line.split("=", 1) for line in os.fsdecode(given).split("\0") if "=" in line)
        if variables.get(RANK_VARIABLE) != str(self.rank):
            raise StartError(
                f"Process {self.placeholder} is not the placeholder of rank {self.rank}: a stage has to see the "
                "processes that mpirun starts on its host, and so has to run in the same container as these."
            )
        return {name: value for name, value in variables.items() if name.startswith(IDENTITY_PREFIXES)}
