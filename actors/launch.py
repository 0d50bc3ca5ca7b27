"""The way to a running pipeline: cluster, rows, actors, weights, sockets. The module imports Ray; see `cluster`."""

import asyncio
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from actors.cluster import Cluster
from actors.errors import LinkError, ProtocolError, StartError
from actors.health import StageHealth, StageProgress
from actors.options import PipelineOptions
from actors.placement import Seat
from actors.placement_group import place
from actors.sockets.address import Address, TcpAddress, UnixAddress
from actors.sockets.host import HostLink, Terms
from actors.sockets.link import LinkEvents
from actors.sockets.listener import HostListener, connect
from actors.stage_actor import StageSetup
from actors.stage_group import StageGroup
from actors.stage_identity import ENGINE, StageIdentity, stage_name
from stages.step import Host

TEMPORARY_PATH_MAX = 60
"""A unix socket's path has at most 107 bytes; ours adds some 30 to the directory for temporary files."""


class EngineEnd(msgspec.Struct, frozen=True, kw_only=True):
    """The engine's side of its two links: whom they tell, and how they prove who they are."""

    epoch: int
    secret: bytes
    inlet: LinkEvents
    outlet: LinkEvents


class Launch:
    """Everything a pipeline has started, whole or in part; `close` ends it."""

    def __init__(
        self, options: PipelineOptions, engine: EngineEnd, on_progress: Callable[[StageProgress], None]
    ) -> None:
        self._options = options
        self._engine = engine
        self._on_progress = on_progress
        self._deadline = asyncio.get_running_loop().time() + options.start_timeout_s
        self._directory = Path(_short_temporary_directory())
        self._cluster: Cluster | None = None
        self._group: StageGroup | None = None
        self._listener: HostListener | None = None
        self._inlet: HostLink | None = None
        self._outlet: HostLink | None = None

    async def run(self) -> HostLink:
        """Starts the pipeline and returns the link to its first stage. Raises what `Pipeline.start` raises."""
        options = self._options
        rows = len(options.specs) * options.rows_per_stage
        self._cluster = await Cluster.join(options.ray_address, rows)
        left = self._deadline - asyncio.get_running_loop().time()
        placement = await place(self._cluster, len(options.specs), options.rows_per_stage, seconds=left)
        here = await self._cluster.node_id()
        self._group = StageGroup(self._cluster, placement, self._setups(placement.seats), here)
        await self._group.load(self._deadline, self._on_progress)
        hosts = {host.node_id: host for host in (await self._cluster.topology()).hosts}
        inlet = await self._join(self._group, placement.seats, hosts[here])
        for seat, spec in zip(placement.seats, options.specs, strict=True):
            layers = len(spec.layers)
            self._on_progress(
                StageProgress(
                    stage=spec.index,
                    host=seat.host.name,
                    rows=seat.rows,
                    phase="ready",
                    layers_done=layers,
                    layers=layers,
                )
            )
        return inlet

    async def health(self) -> list[StageHealth]:
        """What every stage says of itself; nothing before there are stages."""
        return [] if self._group is None else await self._group.health()

    async def close(self) -> None:
        """Ends and removes what was started. May be repeated, also after it failed half-way."""
        for end in (self._listener, self._inlet, self._outlet):
            if end is not None:
                end.close()
        try:
            group, self._group = self._group, None
            if group is not None:
                await group.close()
        finally:
            cluster, self._cluster = self._cluster, None
            if cluster is not None:
                await cluster.leave()
            await asyncio.to_thread(shutil.rmtree, self._directory, ignore_errors=True)

    def _setups(self, seats: list[Seat]) -> list[StageSetup]:
        options = self._options
        return [
            StageSetup(
                identity=StageIdentity(
                    index=spec.index,
                    stages=len(options.specs),
                    host=seat.host.name,
                    epoch=self._engine.epoch,
                    secret=self._engine.secret,
                    dtype=options.stage.dtype,
                    bytes_per_token=options.bytes_per_token,
                ),
                spec=spec,
                options=options.stage,
                device=options.device,
                runner=options.runner,
                rows=seat.rows,
                neighbour=seat.neighbour,
                neighbours=seat.neighbours,
            )
            for spec, seat in zip(options.specs, seats, strict=True)
        ]

    async def _join(self, group: StageGroup, seats: list[Seat], here: Host) -> HostLink:
        """Opens every stage's socket, then joins each to the next; the engine is before the first, after the last."""
        hosts = [here, *(seat.host for seat in seats), here]
        wanted = [self._address(hosts[index], hosts[index + 1], f"{index}.sock") for index in range(len(hosts) - 1)]
        last = stage_name(len(seats) - 1)
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
        )


def _short_temporary_directory() -> str:
    usual = tempfile.gettempdir()
    parent = usual if len(usual) <= TEMPORARY_PATH_MAX else "/tmp"  # noqa: S108 - mkdtemp makes a private one in it
    return tempfile.mkdtemp(prefix="galaxyline-", dir=parent)
