"""The Ray actor around a stage server: it sets its process up, and passes calls on.

Nothing here may import torch: the actor's environment has to be set before that happens.
"""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import msgspec
import structlog

from actors.log import configure_logging
from actors.mpi.membership import Membership
from actors.release import refuse_other_release
from actors.sockets.listener import Address
from actors.stage.cores import apply_share, share_cores, tell_torch
from actors.stage.health import StageHealth
from actors.stage.identity import StageIdentity
from actors.stage.mesh_hop import MeshHop, Sockets, Transfer
from actors.stage.preparation import Preparation, prepare
from actors.stage.runner import MeshRunner, OnProgress, StageRunner, runner_factory
from actors.stage.server import StageServer
from stages.device import DEVICE_VARIABLE, Device
from stages.mesh_spec import MeshSocketSpec
from stages.options import StageOptions
from stages.plan import StageSpec


class StageSetup(msgspec.Struct, frozen=True, kw_only=True):
    """All that an actor is told. It is the `neighbour`-th of `neighbours` stages on its host and owns `rows` there.

    `membership` is its place in the world where hidden states pass from mesh to mesh, through sockets of `fifo_bytes`.
    `environment` is added to the process's own, whatever stands there.
    """

    identity: StageIdentity
    spec: StageSpec
    options: StageOptions
    device: Device
    runner: str
    rows: list[int]
    neighbour: int
    neighbours: int
    environment: dict[str, str] = {}
    membership: Membership | None = None
    fifo_bytes: int = 0


class StageActor:
    """One stage of a pipeline in a process of its own, or a spare that has not been told yet which one.

    Asynchronous, so that health is answered at any time.
    """

    def __init__(self, release: str, host: str, packed: bytes | None) -> None:
        """`packed` is a StageSetup as msgpack, which another release than `release` might not be able to read: nothing
        is read of it where this process, on `host`, runs another one. Raises ReleaseError then.

        A spare gets None: all it can do until `take_up` is to `prepare`.
        """
        refuse_other_release(release, host)
        setup = None if packed is None else msgspec.msgpack.decode(packed, type=StageSetup)
        configure_logging()
        if setup is not None:
            self._become(setup)

    async def pid(self) -> int:
        """Of this process."""
        return os.getpid()

    async def prepare(self, packed: bytes) -> None:
        """Imports ahead what `packed`, a Preparation as msgpack, asks for. Raises StartError."""
        preparation = msgspec.msgpack.decode(packed, type=Preparation)
        with ThreadPoolExecutor(1, thread_name_prefix="prepare") as thread:
            await asyncio.get_running_loop().run_in_executor(thread, prepare, preparation)

    async def take_up(self, packed: bytes) -> None:
        """Makes a spare the stage of `packed`, as the constructor does."""
        self._become(msgspec.msgpack.decode(packed, type=StageSetup))

    def _become(self, setup: StageSetup) -> None:
        os.environ[DEVICE_VARIABLE] = setup.device
        if setup.membership is not None:
            setup.membership.take_up(os.environ)
        os.environ.update(setup.environment)
        shares = share_cores(sorted(os.sched_getaffinity(0)), setup.neighbours)
        apply_share(shares[setup.neighbour], os.environ)
        self._setup = setup
        self._threads = shares[setup.neighbour].threads
        self._server = StageServer(setup.identity)
        self._hop: MeshHop | None = None
        structlog.get_logger().info("stage starts", stage=setup.spec.index, rows=setup.rows, threads=self._threads)

    async def load(self) -> None:
        """Loads the stage's weights; `health` tells the progress. Raises what loading raises."""
        await asyncio.wrap_future(self._server.load(self._make_runner))

    async def listen(self, address: Address) -> Address:
        """Opens the address for the stage before; returns the one it was bound to. Raises LinkError."""
        return await asyncio.wrap_future(self._server.listen(address, self._mesh_spec))

    async def connect(self, address: Address) -> None:
        """Joins the next stage or the engine. Raises LinkError or ProtocolError."""
        await asyncio.wrap_future(self._server.connect(address, self._mesh_spec))

    async def reset(self, epoch: int, secret: bytes) -> None:
        """Leaves its links, to be joined to its neighbours anew. Raises LinkError where it is not there any more."""
        identity = msgspec.structs.replace(self._setup.identity, epoch=epoch, secret=secret)
        self._setup = msgspec.structs.replace(self._setup, identity=identity)
        await asyncio.wrap_future(self._server.reset(identity))

    async def open_mesh_sockets(self) -> None:
        """Makes the sockets to the meshes before and after, which do the same; nothing where there are none."""
        if self._hop is not None:
            await asyncio.wrap_future(self._server.call(self._hop.open_sockets))

    async def pass_barrier(self) -> None:
        """Waits until all stages have their mesh sockets."""
        if self._hop is not None:
            await asyncio.wrap_future(self._server.call(self._hop.barrier))

    async def transfers(self) -> list[Transfer]:
        """What has gone through the stage's mesh sockets lately."""
        return [] if self._hop is None else self._hop.transfers()

    async def health(self) -> StageHealth:
        """What the stage is doing at this moment."""
        return self._server.health()

    async def close(self) -> None:
        """Ends links and threads."""
        await asyncio.to_thread(self._server.close)

    @property
    def _mesh_spec(self) -> MeshSocketSpec | None:
        return None if self._hop is None else self._hop.spec

    def _make_runner(self, on_progress: OnProgress) -> StageRunner:
        setup = self._setup
        make = runner_factory(setup.runner)
        tell_torch(self._threads)
        if setup.membership is None:
            return make(setup.spec, setup.options, on_progress)
        from stages.backend import mesh_sockets  # noqa: PLC0415 - imports ttnn, which reads the environment

        mesh_sockets.join_world()
        runner = cast("MeshRunner", make(setup.spec, setup.options, on_progress))
        sockets = Sockets(mesh_sockets.MeshSender, mesh_sockets.MeshReceiver, mesh_sockets.barrier)
        self._hop = MeshHop(runner, setup.identity, setup.fifo_bytes, sockets)
        return self._hop
