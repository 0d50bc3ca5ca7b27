"""The MPI world of a pipeline whose stages are joined from mesh to mesh: a rank and a place in the mesh graph for each.

An MPI world neither goes on without a rank nor reports its loss: a pipeline that has lost a stage ends its world and
makes another one for new processes. The module imports Ray; see `cluster`.
"""

import asyncio
import os
from collections.abc import Callable, MutableMapping, Sequence
from pathlib import Path

import msgspec

from actors.cluster.cluster import Cluster
from actors.cluster.placement import StagePlacement
from actors.errors import LinkError, StartError
from actors.mpi.daemons import Daemons
from actors.mpi.galaxy import mesh_graph_descriptor
from actors.mpi.mpirun import Mpirun, mpirun_command, write_agent
from actors.mpi.placeholder import RANK_VARIABLE
from actors.options import PipelineOptions

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


class MpiWorld:
    """A running MPI world, made by `start`; `close` ends all its processes, which are not the stages' own."""

    def __init__(self, daemons: Daemons, mpirun: Mpirun, memberships: list[Membership]) -> None:
        self._daemons = daemons
        self._mpirun = mpirun
        self.memberships = memberships

    @classmethod
    async def start(
        cls,
        cluster: Cluster,
        placements: Sequence[StagePlacement],
        options: PipelineOptions,
        directory: Path,
        deadline: float,
        lost: Callable[[LinkError], None],
    ) -> "MpiWorld":
        """Starts a rank for each stage on its host, until the loop's clock shows `deadline`; files go to `directory`.

        `lost` is called should the world end by itself after that. Raises StartError.
        """
        graph = mesh_graph_descriptor(len(placements), options.cluster.rows_per_stage)
        hosts = [placed.host for placed in placements]
        agent, path = directory / "daemon_agent", str(directory / "daemons.sock")
        write_agent(agent, path)
        daemons = Daemons(cluster, {host.name: host for host in hosts}, path)
        await daemons.listen()
        try:
            command = mpirun_command(hosts, await cluster.node_id(), str(agent))
            mpirun = await Mpirun.start(command, directory, len(placements), deadline, lost)
        except BaseException:
            await asyncio.shield(daemons.close())
            raise
        memberships = [
            Membership(rank=index, mesh_graph=graph, placeholder=mpirun.ranks[index])
            for index in range(len(placements))
        ]
        return cls(daemons, mpirun, memberships)

    @property
    def pids(self) -> list[int]:
        """The pid of mpirun itself, then those of the placeholders, by rank."""
        return self._mpirun.pids

    async def close(self) -> None:
        """Ends every process of the world. Raises PipelineError if they stay."""
        try:
            await self._mpirun.close()
        finally:
            await self._daemons.close()
