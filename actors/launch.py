"""The way to a running pipeline: cluster, rows, actors, weights, sockets. The module imports Ray; see `cluster`."""

import asyncio
import functools
import shutil
import tempfile
from collections.abc import Callable, Collection, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from actors.cluster.cluster import Cluster
from actors.cluster.placement import StagePlacement
from actors.cluster.placement_group import Placement, place
from actors.engine_end import EngineEnd
from actors.errors import LinkError, ProtocolError, StartError
from actors.mpi.galaxy_chips import VISIBLE_DEVICES, visible_devices
from actors.mpi.world import World
from actors.options import PipelineOptions
from actors.sockets.host import HostLink, Terms
from actors.sockets.listener import Address, HostListener, TcpAddress, UnixAddress, connect
from actors.stage.actor import StageActor, StageSetup
from actors.stage.group import StageGroup
from actors.stage.health import StageHealth, StageProgress
from actors.stage.identity import ENGINE, StageIdentity, stage_name
from actors.stage.mesh_hop import Transfer
from actors.stage.spares import Spares
from stages.step import Host

TEMPORARY_PATH_MAX = 60
"""A unix socket's path has at most 107 bytes; ours adds some 30 to the directory for temporary files."""


class Launch:
    """Everything a pipeline has started, whole or in part; `close` ends it."""

    def __init__(
        self, options: PipelineOptions, engine: EngineEnd, on_progress: Callable[[StageProgress], None]
    ) -> None:
        self._options = options
        self._engine = engine
        self._placement: Placement | None = None
        self._on_progress = on_progress
        self._deadline = asyncio.get_running_loop().time() + options.start_timeout_s
        self._directory = Path(_short_temporary_directory())
        self._cluster: Cluster | None = None
        self._world: World | None = None
        self._world_lost: asyncio.Future[LinkError] = asyncio.get_running_loop().create_future()
        self._group: StageGroup | None = None
        self._spares: Spares | None = None
        self._listener: HostListener | None = None
        self._inlet: HostLink | None = None
        self._outlet: HostLink | None = None

    async def run(self) -> HostLink:
        """Starts the pipeline and returns the link to its first stage. Raises what `Pipeline.start` raises."""
        options = self._options
        rows = len(options.specs) * options.rows_per_stage
        self._cluster = await Cluster.join(options.ray_address, rows)
        return await self._start(self._cluster)

    async def mend(self, engine: EngineEnd, given_up: Collection[int]) -> HostLink:
        """Joins all stages anew for another epoch; those `given_up`, and those that cannot be joined, are replaced.

        Stages that are joined from mesh to mesh all start anew, in another world. Returns the link to the first stage.
        Raises PlacementError or StartError, and may be called again after that.
        """
        self._engine = engine
        self._deadline = asyncio.get_running_loop().time() + self._options.start_timeout_s
        self._close_links()
        if self._cluster is None:
            raise StartError("The pipeline is closed.")
        if self._world is not None or self._group is None or self._placement is None or self._spares is None:
            await self._close_stages()
            return await self._start(self._cluster)
        lost = await self._group.reset(engine.epoch, engine.secret, given_up)
        if lost:
            await self._group.give_up(lost)
            await self._placement.settle(self._deadline - asyncio.get_running_loop().time())
            setups = self._setups(self._placement.stages)
            replaced = {index: setups[index] for index in lost}
            await self._group.replace(replaced, self._spares, self._deadline, self._on_progress)
        inlet = await self._join(self._group, self._placement.stages, await self._here(self._cluster))
        self._tell_ready(self._placement.stages)
        self._spares.provide(self._placement.stages)
        return inlet

    async def _start(self, cluster: Cluster) -> HostLink:
        options = self._options
        left = self._deadline - asyncio.get_running_loop().time()
        seconds = min(left, options.placement_timeout_s)
        placement = await place(
            cluster,
            len(options.specs),
            options.rows_per_stage,
            options.pipelines,
            seconds=seconds,
            actor_class=StageActor.__name__,
        )
        self._placement = placement
        if options.transport == "mesh":
            lost = self._world_lost = asyncio.get_running_loop().create_future()
            self._world = await World.start(
                cluster, placement.stages, options, self._directory, self._deadline, functools.partial(_lose, lost)
            )
        here = await self._here(cluster)
        self._group = StageGroup(cluster, placement, self._setups(placement.stages), here.node_id)
        inlet = await self._unless_lost(self._bring_up(self._group, placement.stages, here))
        outlet = self._engine.outlet
        self._world_lost.add_done_callback(lambda lost: outlet.lost(lost.result()))
        self._tell_ready(placement.stages)
        # Only now, so that what is to serve starts first.
        self._spares = Spares(cluster, options, here.node_id)
        self._spares.provide(placement.stages)
        return inlet

    async def _here(self, cluster: Cluster) -> Host:
        node_id = await cluster.node_id()
        return next(host for host in (await cluster.topology()).hosts if host.node_id == node_id)

    def _tell_ready(self, placements: list[StagePlacement]) -> None:
        for placed, spec in zip(placements, self._options.specs, strict=True):
            layers = len(spec.layers)
            self._on_progress(
                StageProgress(
                    stage=spec.index,
                    host=placed.host.name,
                    rows=placed.rows,
                    phase="ready",
                    layers_done=layers,
                    layers=layers,
                )
            )

    async def health(self) -> list[StageHealth]:
        """What every stage says of itself; nothing before there are stages."""
        return [] if self._group is None else await self._group.health()

    async def transfers(self) -> list[list[Transfer]]:
        """What has gone through each stage's mesh sockets lately; nothing before there are stages."""
        return [] if self._group is None else await self._group.transfers()

    @property
    def world_pids(self) -> list[int]:
        """The processes that hold an MPI world together, mpirun's own first; none without one."""
        return [] if self._world is None else self._world.pids

    async def spare_pids(self) -> list[int]:
        """The processes that wait to become a stage, once they can."""
        return [] if self._spares is None else await self._spares.pids()

    async def close(self) -> None:
        """Ends and removes what was started. May be repeated, also after it failed half-way."""
        self._close_links()
        cluster, self._cluster = self._cluster, None
        async with AsyncExitStack() as last_first:
            last_first.push_async_callback(asyncio.to_thread, shutil.rmtree, self._directory, ignore_errors=True)
            if cluster is not None:
                last_first.push_async_callback(cluster.leave)
            last_first.push_async_callback(self._close_stages)

    def _close_links(self) -> None:
        for end in (self._listener, self._inlet, self._outlet):
            if end is not None:
                end.close()

    async def _close_stages(self) -> None:
        """Ends spares and stages, then the world that they were in, and gives back the rows."""
        group, self._group = self._group, None
        world, self._world = self._world, None
        placement, self._placement = self._placement, None
        spares, self._spares = self._spares, None
        async with AsyncExitStack() as last_first:
            if group is None and placement is not None:
                last_first.push_async_callback(placement.remove)
            if world is not None:
                last_first.push_async_callback(world.close)
            if group is not None:
                last_first.push_async_callback(group.close)
            if spares is not None:
                last_first.push_async_callback(spares.close)

    def _setups(self, placements: list[StagePlacement]) -> list[StageSetup]:
        options = self._options
        return [
            StageSetup(
                identity=StageIdentity(
                    index=spec.index,
                    stages=len(options.specs),
                    host=placed.host.name,
                    epoch=self._engine.epoch,
                    secret=self._engine.secret,
                    dtype=options.stage.dtype,
                    bytes_per_token=options.bytes_per_token,
                    silence_s=options.silence_s,
                ),
                spec=spec,
                options=options.stage,
                device=options.device,
                runner=options.runner,
                rows=placed.rows,
                neighbour=placed.neighbour,
                neighbours=placed.neighbours,
                environment=self._environment(spec.index, placed),
                membership=None if self._world is None else self._world.memberships[spec.index],
                fifo_bytes=options.fifo_bytes,
            )
            for spec, placed in zip(options.specs, placements, strict=True)
        ]

    def _environment(self, stage: int, placed: StagePlacement) -> dict[str, str]:
        """Of a stage's own: on chips it sees those of its rows alone, unless the user names others."""
        own = self._options.environment(stage)
        if self._options.device != "ttnn" or VISIBLE_DEVICES in own:
            return own
        return {VISIBLE_DEVICES: visible_devices(placed.rows), **own}

    async def _bring_up(self, group: StageGroup, placements: list[StagePlacement], here: Host) -> HostLink:
        await group.load(self._deadline, self._on_progress)
        inlet = await self._join(group, placements, here)
        if self._world is not None:
            await group.join_meshes(self._deadline)
        return inlet

    async def _unless_lost(self, start: Coroutine[None, None, HostLink]) -> HostLink:
        """The outcome of `start`, unless the world ends before: stages would wait in vain for each other then."""
        starting = asyncio.ensure_future(start)
        try:
            either: set[asyncio.Future[Any]] = {starting, self._world_lost}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                raise StartError(f"The pipeline could not be started: {self._world_lost.result()}")
            return starting.result()
        finally:
            starting.cancel()

    async def _join(self, group: StageGroup, placements: list[StagePlacement], here: Host) -> HostLink:
        """Opens every stage's socket, then joins each to the next; the engine is before the first, after the last."""
        hosts = [here, *(placed.host for placed in placements), here]
        wanted = [
            self._address(hosts[index], hosts[index + 1], f"{self._engine.epoch}-{index}.sock")
            for index in range(len(hosts) - 1)
        ]
        last = stage_name(len(placements) - 1)
        try:
            self._listener = HostListener.open(wanted[-1], self._terms(last), self._engine.outlet)
            bound = await group.listen(wanted[:-1], self._deadline)
            self._inlet = await connect(bound[0], self._terms(stage_name(0)), self._engine.inlet)
            await group.connect([*bound[1:], self._listener.address], self._deadline)
            self._outlet = await self._listener.accepted()
        except (LinkError, ProtocolError) as error:
            raise StartError(f"The engine could not join its stages: {error}") from error
        return self._inlet

    def _address(self, sender: Host, receiver: Host, name: str) -> Address:
        if sender.node_id == receiver.node_id:
            return UnixAddress(str(self._directory / name))
        return TcpAddress(receiver.address, 0)

    def _terms(self, peer: str) -> Terms:
        return Terms(
            epoch=self._engine.epoch,
            secret=self._engine.secret,
            name=ENGINE,
            peer=peer,
            dtype=self._options.stage.dtype,
            bytes_per_token=0,
            silence_s=self._options.silence_s,
        )


def _lose(lost: "asyncio.Future[LinkError]", error: LinkError) -> None:
    if not lost.done():
        lost.set_result(error)


def _short_temporary_directory() -> str:
    usual = tempfile.gettempdir()
    parent = usual if len(usual) <= TEMPORARY_PATH_MAX else "/tmp"  # noqa: S108 # nosec B108 # a private one in it
    return tempfile.mkdtemp(prefix="galaxyline-", dir=parent)
