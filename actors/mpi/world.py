"""The world of one pipeline whose stages are joined from mesh to mesh: its MPI ranks, meshes and visible chips.

An MPI world neither loses a rank nor tells of it: a pipeline that has lost a stage ends its world, and the next one
makes a new one for new processes. The module imports Ray; see `cluster`.
"""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from actors.cluster.cluster import Cluster
from actors.cluster.placement import StagePlacement
from actors.errors import LinkError
from actors.mpi.daemons import Daemons
from actors.mpi.membership import Membership
from actors.mpi.mesh_graph import mesh_graph_descriptor
from actors.mpi.mpirun import MpiWorld, mpirun_command, write_agent
from actors.options import PipelineOptions


class World:
    """Made by `start`; `close` ends all its processes, which are not the stages' own."""

    def __init__(self, daemons: Daemons, mpi: MpiWorld, memberships: list[Membership]) -> None:
        self._daemons = daemons
        self._mpi = mpi
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
    ) -> "World":
        """A rank for each stage on its host, until the loop's clock shows `deadline`; files go to `directory`.

        `lost` is called should the world end by itself. Raises StartError.
        """
        graph = mesh_graph_descriptor(len(placements), options.rows_per_stage)
        hosts = [placed.host for placed in placements]
        agent, path = directory / "daemon_agent", str(directory / "daemons.sock")
        write_agent(agent, path)
        daemons = Daemons(cluster, {host.name: host for host in hosts}, path)
        await daemons.listen()
        try:
            command = mpirun_command(hosts, await cluster.node_id(), str(agent))
            mpi = await MpiWorld.start(command, directory, len(placements), deadline, lost)
        except BaseException:
            await asyncio.shield(daemons.close())
            raise
        memberships = [
            Membership(rank=index, mesh_graph=graph, placeholder=mpi.ranks[index]) for index in range(len(placements))
        ]
        return cls(daemons, mpi, memberships)

    @property
    def pids(self) -> list[int]:
        """mpirun's own, then the placeholders', by rank."""
        return self._mpi.pids

    async def close(self) -> None:
        """Ends every process of the world. Raises PipelineError if they do not go."""
        try:
            await self._mpi.close()
        finally:
            await self._daemons.close()
