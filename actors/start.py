"""The start of a pipeline's stages: rows, an MPI world where they need one, actors, weights, links and spares.

The module imports Ray; see `actors.cluster.cluster`.
"""

import asyncio
import functools
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from actors.cluster.cluster import Cluster
from actors.cluster.placement_group import Placement, place
from actors.errors import LinkError, ProtocolError, StartError
from actors.mpi.world import MpiWorld
from actors.options import PipelineOptions
from actors.sockets.host import HostLink, Terms
from actors.sockets.link import EngineLinks
from actors.sockets.listener import Address, HostListener, TcpAddress, UnixAddress, connect
from actors.stage.actor import StageActor
from actors.stage.group import StageGroup
from actors.stage.health import StageHealth, StageProgress
from actors.stage.mesh_hop import Transfer
from actors.stage.setup import ENGINE, stage_name, stage_setups
from actors.stage.spares import Spares
from stages.kv.inventory import Inventory
from stages.step import Host


class Chain:
    """The engine's ends of a chain that is joined: `downstream` leads to the first stage. Made by `join`."""

    def __init__(self, downstream: HostLink, upstream: HostLink) -> None:
        self.downstream = downstream
        self._upstream = upstream

    @classmethod
    async def join(
        cls,
        group: StageGroup,
        hosts: Sequence[Host],
        links: EngineLinks,
        options: PipelineOptions,
        directory: Path,
        deadline: float,
    ) -> "Chain":
        """Opens every stage's socket, then joins each stage to the next, until the loop's clock shows `deadline`.

        `hosts` are the engine's and those of the stages, in order; the engine is before the first stage and after the
        last. Unix sockets are made in `directory`. Raises StartError.
        """
        around = [*hosts, hosts[0]]
        names = [f"{links.epoch}-{index}.sock" for index in range(len(around) - 1)]
        addresses = [
            _address(directory / name, sender, receiver)
            for name, sender, receiver in zip(names, around[:-1], around[1:], strict=True)
        ]
        ends: list[HostListener | HostLink] = []
        try:
            listener = HostListener.open(
                addresses[-1], _engine_terms(links, options, stage_name(len(hosts) - 2)), links.upstream
            )
            ends.append(listener)
            bound = await group.listen(addresses[:-1], deadline)
            downstream = await connect(bound[0], _engine_terms(links, options, stage_name(0)), links.downstream)
            ends.append(downstream)
            await group.connect([*bound[1:], listener.address], deadline)
            return cls(downstream, await listener.accepted())
        except BaseException as error:
            for end in ends:
                end.close()
            if isinstance(error, LinkError | ProtocolError):
                raise StartError(f"The engine could not join its stages: {error}") from error
            raise

    def close(self) -> None:
        """Ends the engine's links. May be repeated."""
        self.downstream.close()
        self._upstream.close()


def _address(path: Path, sender: Host, receiver: Host) -> Address:
    """Within a host a unix socket at `path`, else a TCP port of the receiver's that the kernel chooses."""
    return UnixAddress(str(path)) if sender.node_id == receiver.node_id else TcpAddress(receiver.address, 0)


def _engine_terms(links: EngineLinks, options: PipelineOptions, peer: str) -> Terms:
    return Terms(
        epoch=links.epoch,
        secret=links.secret,
        name=ENGINE,
        peer=peer,
        dtype=options.stage.dtype,
        bytes_per_token=0,
        silence_s=options.silence_s,
    )


class StartedStages:
    """Stages that run, on the rows of their `placement`, with their `spares` and, from mesh to mesh, an MPI world."""

    def __init__(
        self, placement: Placement, group: StageGroup, spares: Spares, mpi: MpiWorld | None, ending: AsyncExitStack
    ) -> None:
        """`ending` ends all of them, the last first."""
        self.placement = placement
        self.group = group
        self.spares = spares
        self.mpi = mpi
        self._ending = ending
        self._is_closed = False

    async def inventories(self, versions: Sequence[int]) -> list[Inventory | None]:
        """Returns what every stage keeps beside its device since the versions; nothing after `close`."""
        return [] if self._is_closed else await self.group.inventories(versions)

    async def health(self) -> list[StageHealth]:
        """Returns the health of every stage, in order; nothing after `close`."""
        return [] if self._is_closed else await self.group.health()

    async def transfers(self) -> list[list[Transfer]]:
        """Returns what has gone through each stage's mesh sockets lately; nothing after `close`."""
        return [] if self._is_closed else await self.group.transfers()

    @property
    def mpi_pids(self) -> list[int]:
        """The processes that hold an MPI world together, mpirun's own first; none without one."""
        return [] if self.mpi is None or self._is_closed else self.mpi.pids

    async def close(self) -> None:
        """Ends spares and stages, gives back the rows, then ends the MPI world. May be repeated."""
        self._is_closed = True
        await self._ending.aclose()


class StageStarter:
    """Starts and joins the stages that `options` describe, in a cluster; unix sockets are made in `directory`."""

    def __init__(
        self,
        options: PipelineOptions,
        cluster: Cluster,
        directory: Path,
        on_progress: Callable[[StageProgress], None],
    ) -> None:
        self.options = options
        self.on_progress = on_progress
        self.cluster = cluster
        self._directory = directory

    async def start(self, links: EngineLinks, deadline: float) -> tuple[StartedStages, Chain]:
        """Starts all stages and joins them, until the loop's clock shows `deadline`.

        `links.upstream` also gets the event if the MPI world is lost later. Raises PlacementError, StartError, or what
        loading raises; everything that was started is ended by then.
        """
        ending = AsyncExitStack()
        try:
            return await self._start(links, deadline, ending)
        except BaseException:
            await asyncio.shield(ending.aclose())
            raise

    async def join(self, group: StageGroup, placement: Placement, links: EngineLinks, deadline: float) -> Chain:
        """Joins stages that have their weights, to each other and to the engine. Raises StartError."""
        hosts = [placed.host for placed in placement.stages]
        around = [await self._here(), *hosts]
        return await Chain.join(group, around, links, self.options, self._directory, deadline)

    def report_ready(self, placement: Placement) -> None:
        """Reports for every stage that it is ready."""
        for placed, spec in zip(placement.stages, self.options.specs, strict=True):
            layers = len(spec.layers)
            self.on_progress(
                StageProgress(
                    stage=spec.index,
                    host=placed.host.name,
                    rows=placed.rows,
                    phase="ready",
                    layers_done=layers,
                    layers=layers,
                )
            )

    async def _start(self, links: EngineLinks, deadline: float, ending: AsyncExitStack) -> tuple[StartedStages, Chain]:
        options = self.options
        placement = await self._place(deadline)
        ending.push_async_callback(placement.remove)
        mpi = None
        mpi_lost: asyncio.Future[LinkError] = asyncio.get_running_loop().create_future()
        if options.transport == "mesh":
            lost = functools.partial(_set_once, mpi_lost)
            mpi = await MpiWorld.start(self.cluster, placement.stages, options, self._directory, deadline, lost)
            ending.push_async_callback(mpi.close)
        here = await self._here()
        setups = stage_setups(options, placement.stages, links, () if mpi is None else mpi.memberships)
        group = StageGroup(self.cluster, placement, setups, here.node_id)
        ending.push_async_callback(group.close)
        chain = await _unless_lost(mpi_lost, self._bring_up(group, placement, links, deadline, ending))
        mpi_lost.add_done_callback(lambda lost: links.upstream.lost(lost.result()))
        self.report_ready(placement)
        # Only now, so that the stages that are to serve start first.
        spares = Spares(self.cluster, options, here.node_id)
        ending.push_async_callback(spares.close)
        spares.provide(placement.stages)
        return StartedStages(placement, group, spares, mpi, ending), chain

    async def _bring_up(
        self, group: StageGroup, placement: Placement, links: EngineLinks, deadline: float, ending: AsyncExitStack
    ) -> Chain:
        await group.load(deadline, self.on_progress)
        chain = await self.join(group, placement, links, deadline)
        ending.callback(chain.close)
        if self.options.transport == "mesh":
            await group.join_meshes(deadline)
        return chain

    async def _place(self, deadline: float) -> Placement:
        options = self.options
        left_s = deadline - asyncio.get_running_loop().time()
        return await place(
            self.cluster,
            len(options.specs),
            options.cluster.rows_per_stage,
            options.pipelines,
            seconds=min(left_s, options.cluster.placement_timeout_s),
            actor_class=StageActor.__name__,
        )

    async def _here(self) -> Host:
        """The host of this process."""
        node_id = await self.cluster.node_id()
        return next(host for host in (await self.cluster.topology()).hosts if host.node_id == node_id)


async def _unless_lost(mpi_lost: "asyncio.Future[LinkError]", start: Coroutine[None, None, Chain]) -> Chain:
    """Returns the outcome of `start`, unless the MPI world ends before: stages would wait for each other for ever."""
    starting = asyncio.ensure_future(start)
    try:
        either: set[asyncio.Future[Any]] = {starting, mpi_lost}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            raise StartError(f"The pipeline could not be started: {mpi_lost.result()}")
        return starting.result()
    finally:
        starting.cancel()


def _set_once(lost: "asyncio.Future[LinkError]", error: LinkError) -> None:
    if not lost.done():
        lost.set_result(error)
