"""The MPI world of a pipeline whose stages are joined from mesh to mesh: a rank and a place in the mesh graph for each.

An MPI world neither goes on without a rank nor reports its loss: a pipeline that has lost a stage ends its world and
makes another one for new processes. The module imports Ray; see `cluster`.
"""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from actors.cluster.cluster import Cluster
from actors.cluster.placement import StagePlacement
from actors.errors import LinkError
from actors.mpi.daemons import Daemons
from actors.mpi.galaxy import mesh_graph_descriptor
from actors.mpi.membership import Membership
from actors.mpi.mpirun import Mpirun, mpirun_command, write_agent
from actors.options import PipelineOptions


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
