"""A pipeline that is deployed: its cluster, its stages and the chain they form with the engine.

The module imports Ray; see `actors.cluster.cluster`.
"""

import asyncio
from collections.abc import Callable, Collection, Sequence
from contextlib import AsyncExitStack

import msgspec
import structlog

from actors.cluster.cluster import Cluster
from actors.errors import ClusterError, StartError
from actors.log import StderrRelay
from actors.options import PipelineOptions
from actors.run_directory import RunDirectory
from actors.sockets.host import HostLink
from actors.sockets.link import EngineLinks
from actors.stage.health import StageHealth, StageProgress
from actors.stage.mesh_hop import Transfer
from actors.stage.setup import stage_setups
from actors.start import Chain, StageStarter, StartedStages
from actors.workspace import Workspace
from stages.kv.inventory import Inventory

WATCH_SECONDS = 2.0

log = structlog.get_logger()


class Deployment:
    """A pipeline's stages while they run, through all its epochs. Made by `start`; `close` ends it."""

    def __init__(self, starter: StageStarter, stages: StartedStages, chain: Chain, ending: AsyncExitStack) -> None:
        """`ending` ends what the stages run in: the cluster, if it was started for them, and their directory."""
        self._starter = starter
        self._stages = stages
        self._chain = chain
        self._ending = ending
        self._is_closed = False
        self._watching = asyncio.ensure_future(self._watch())

    @classmethod
    async def start(
        cls,
        options: PipelineOptions,
        workspace: Workspace,
        links: EngineLinks,
        on_progress: Callable[[StageProgress], None],
    ) -> "Deployment":
        """Joins or starts the cluster, then starts and joins all stages. Raises what `Pipeline.start` raises.

        Everything that was started is ended before it raises, the workspace too.
        """
        deadline = asyncio.get_running_loop().time() + options.cluster.start_timeout_s
        ending = AsyncExitStack()
        try:
            directory = workspace.directory
            ending.push_async_callback(workspace.close)
            options = _with_memory(options, directory, ending)
            rows = len(options.specs) * options.cluster.rows_per_stage
            cluster = await Cluster.join(options.cluster.ray_address, rows, directory.ray, workspace.fork_socket)
            ending.push_async_callback(cluster.leave)
            if cluster.is_ours:
                relay = StderrRelay(directory.path / "stderr")
                ending.callback(relay.close)
                options = msgspec.structs.replace(options, stderr=str(relay.path))
            starter = StageStarter(options, cluster, directory.path, on_progress)
            stages, chain = await starter.start(links, deadline)
        except BaseException:
            await asyncio.shield(ending.aclose())
            raise
        return cls(starter, stages, chain, ending)

    @property
    def downstream(self) -> HostLink:
        """The link to the first stage."""
        return self._chain.downstream

    async def rejoin(self, links: EngineLinks, kill: Collection[int]) -> HostLink:
        """Joins all stages for another epoch; those to `kill`, and those that cannot be joined, are replaced.

        Stages that are joined from mesh to mesh all start anew, in another MPI world. Returns the link to the first
        stage. Raises PlacementError or StartError, and may be called again after that.
        """
        deadline = asyncio.get_running_loop().time() + self._starter.options.cluster.start_timeout_s
        self._chain.close()
        if self._is_closed:
            raise StartError("The pipeline is closed.")
        if self._starter.cluster.is_lost:
            raise ClusterError("Ray has ended on this host: no stage can be replaced.")
        if self._stages.mpi is None:
            self._chain = await self._rejoin_stages(links, kill, deadline)
        else:
            self._stages.group.keeps_blocks = True
            await self._stages.close()
            self._stages, self._chain = await self._starter.start(links, deadline)
        return self._chain.downstream

    async def health(self) -> list[StageHealth]:
        """Returns the health of every stage, in order; an empty list once the stages have ended."""
        return await self._stages.health()

    async def inventories(self, versions: Sequence[int]) -> list[Inventory | None]:
        """Returns what every stage keeps beside its device since the versions; None for one that does not answer."""
        return await self._stages.inventories(versions)

    async def transfers(self) -> list[list[Transfer]]:
        """Returns what has gone through each stage's mesh sockets lately."""
        return await self._stages.transfers()

    @property
    def mpi_pids(self) -> list[int]:
        """The processes that hold an MPI world together, mpirun's own first; none without one."""
        return self._stages.mpi_pids

    async def spare_pids(self) -> list[int]:
        """Returns the processes that wait to become a stage, once they can."""
        return await self._stages.spares.pids()

    async def close(self) -> None:
        """Ends and removes everything that was started. May be repeated, also after it failed half-way."""
        self._is_closed = True
        self._watching.cancel()
        self._chain.close()
        try:
            await self._stages.close()
        finally:
            await self._ending.aclose()

    async def _watch(self) -> None:
        """Logs what the pipeline loses while nobody needs it, as it happens: hosts, Ray itself, and spares."""
        cluster, known = self._starter.cluster, set[str]()
        while not cluster.is_lost:
            try:
                known = await self._watch_once(known)
            except ClusterError as error:
                log.warning("the cluster cannot be watched", cause=str(error))
            await asyncio.sleep(WATCH_SECONDS)
        log.error("Ray has ended on this host: requests go on, but no stage can be replaced")

    async def _watch_once(self, known: set[str]) -> set[str]:
        """Logs which of the `known` hosts of stages are gone, and replaces spares; returns the hosts that are there."""
        alive = {host.node_id for host in (await self._starter.cluster.topology()).hosts}
        for placed in self._stages.placement.stages:
            if placed.host.node_id in known - alive:
                log.error("the host of a stage has left the cluster", host=placed.host.name, rows=placed.rows)
        await self._stages.spares.replace_lost()
        return alive

    async def _rejoin_stages(self, links: EngineLinks, kill: Collection[int], deadline: float) -> Chain:
        starter, stages = self._starter, self._stages
        lost = await stages.group.reset(links.epoch, links.secret, kill)
        if lost:
            await stages.group.kill(lost)
            left_s = deadline - asyncio.get_running_loop().time()
            await stages.placement.settle(min(left_s, starter.options.cluster.placement_timeout_s))
            setups = stage_setups(starter.options, stages.placement.stages, links)
            replaced = {index: setups[index] for index in lost}
            await stages.group.replace(replaced, stages.spares, deadline, starter.on_progress)
        chain = await starter.join(stages.group, stages.placement, links, deadline)
        starter.report_ready(stages.placement)
        stages.spares.provide(stages.placement.stages)
        return chain


def _with_memory(options: PipelineOptions, directory: RunDirectory, ending: AsyncExitStack) -> PipelineOptions:
    """The same options with the directory of the tiers in memory, which is this process's too until the end."""
    stage = options.stage
    if stage.tiers.host_bytes == 0:
        return options
    try:
        # A stage that is being replaced uses it again: on this host nobody takes it for abandoned meanwhile.
        ending.callback(RunDirectory.join(directory.memory).leave)
    except OSError as error:
        log.warning("blocks are not kept in memory", directory=str(directory.memory), cause=error.strerror)
    tiers = msgspec.structs.replace(stage.tiers, host_directory=str(directory.memory))
    return msgspec.structs.replace(options, stage=msgspec.structs.replace(stage, tiers=tiers))
