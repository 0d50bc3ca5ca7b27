"""The Ray actor around a stage server: it sets its process up, and forwards calls.

Nothing here may import torch: the actor's environment has to be set before that happens.
"""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import msgspec
import structlog

from actors.log import configure_logging, send_stderr_to
from actors.release import refuse_other_release
from actors.sockets.listener import Address
from actors.stage.health import StageHealth
from actors.stage.mesh_hop import MeshHop, Sockets, Transfer
from actors.stage.process import Preparation, apply_share, prepare, set_torch_threads, share_cores
from actors.stage.runner import MeshRunner, OnProgress, StageRunner, runner_factory
from actors.stage.server import StageServer
from actors.stage.setup import StageSetup
from actors.stage.tier_directories import TierDirectories
from stages.device import DEVICE_VARIABLE
from stages.kv.inventory import Inventory
from stages.mesh_spec import MeshSocketSpec


class StageActor:
    """One stage of a pipeline in a process of its own, or a spare that has no stage yet.

    It is asynchronous, so that health is answered at any time.
    """

    def __init__(self, release: str, host: str, packed: bytes | None) -> None:
        """Becomes the stage of `packed`, a StageSetup as msgpack, or a spare where it is None.

        Only the same `release` is certain to be able to read a setup: raises ReleaseError, before anything of it is
        read, where this process, on `host`, runs another one. A spare can do no more than `prepare` until `assign`.
        """
        refuse_other_release(release, host)
        setup = None if packed is None else msgspec.msgpack.decode(packed, type=StageSetup)
        configure_logging()
        if setup is not None:
            if setup.stderr is not None:
                send_stderr_to(setup.stderr)
            self._become(setup)

    async def pid(self) -> int:
        """Returns the id of this process."""
        return os.getpid()

    async def prepare(self, packed: bytes) -> None:
        """Imports ahead what the stages of `packed`, a Preparation as msgpack, need. Raises StartError."""
        preparation = msgspec.msgpack.decode(packed, type=Preparation)
        if preparation.stderr is not None:
            send_stderr_to(preparation.stderr)
        with ThreadPoolExecutor(1, thread_name_prefix="prepare") as thread:
            await asyncio.get_running_loop().run_in_executor(thread, prepare, preparation)

    async def assign(self, packed: bytes) -> None:
        """Makes a spare the stage of `packed`, a StageSetup as msgpack."""
        self._become(msgspec.msgpack.decode(packed, type=StageSetup))

    def _become(self, setup: StageSetup) -> None:
        os.environ[DEVICE_VARIABLE] = setup.device
        if setup.membership is not None:
            setup.membership.apply(os.environ)
        os.environ.update(setup.environment)
        shares = share_cores(sorted(os.sched_getaffinity(0)), setup.neighbours)
        apply_share(shares[setup.neighbour], os.environ)
        self._setup = setup
        self._threads = shares[setup.neighbour].threads
        self._server = StageServer(setup.identity)
        self._hop: MeshHop | None = None
        self._directories = TierDirectories(setup)
        structlog.get_logger().info("stage starts", stage=setup.spec.index, rows=setup.rows, threads=self._threads)

    async def load(self) -> None:
        """Loads the stage's weights; `health` has the progress. Raises what loading raises."""
        await asyncio.wrap_future(self._server.load(self._make_runner))

    async def listen(self, address: Address) -> Address:
        """Opens the address for the stage before; returns the address it was bound to. Raises LinkError."""
        return await asyncio.wrap_future(self._server.listen(address, self._mesh_spec))

    async def connect(self, address: Address) -> None:
        """Joins the next stage or the engine. Raises LinkError or ProtocolError."""
        await asyncio.wrap_future(self._server.connect(address, self._mesh_spec))

    async def reset(self, epoch: int, secret: bytes) -> None:
        """Leaves the links, to be joined to the neighbours anew. Raises LinkError where the stage was closed."""
        identity = msgspec.structs.replace(self._setup.identity, epoch=epoch, secret=secret)
        self._setup = msgspec.structs.replace(self._setup, identity=identity)
        await asyncio.wrap_future(self._server.reset(identity))

    async def open_mesh_sockets(self) -> None:
        """Makes the sockets to the meshes before and after, if there are any; waits until these do the same."""
        if self._hop is not None:
            await asyncio.wrap_future(self._server.call(self._hop.open_sockets))

    async def pass_barrier(self) -> None:
        """Waits until all stages have their mesh sockets."""
        if self._hop is not None:
            await asyncio.wrap_future(self._server.call(self._hop.barrier))

    async def transfers(self) -> list[Transfer]:
        """Returns what has gone through the stage's mesh sockets lately."""
        return [] if self._hop is None else self._hop.transfers()

    async def health(self) -> StageHealth:
        """Returns what the stage is doing at this moment."""
        return self._server.health()

    async def inventory(self, version: int) -> Inventory | None:
        """Returns what the stage keeps beside its device, or what changed of it; None before it is loaded."""
        return self._server.inventory(version)

    async def close(self, *, keeps_blocks: bool = False) -> None:
        """Ends links and threads; what is kept in memory stays for the stage that comes next, if there is to be one."""
        await asyncio.to_thread(self._server.close)
        await asyncio.to_thread(self._directories.leave, keeps_blocks=keeps_blocks)

    @property
    def _mesh_spec(self) -> MeshSocketSpec | None:
        return None if self._hop is None else self._hop.spec

    def _make_runner(self, on_progress: OnProgress) -> StageRunner:
        setup = self._setup
        make = runner_factory(setup.runner)
        set_torch_threads(self._threads)
        options = msgspec.structs.replace(setup.options, tiers=self._directories.enter())
        if setup.membership is None:
            return make(setup.spec, options, on_progress)
        from stages.backend import mesh_sockets  # noqa: PLC0415 - imports ttnn, which reads the environment

        mesh_sockets.join_world()
        runner = cast("MeshRunner", make(setup.spec, options, on_progress))
        sockets = Sockets(mesh_sockets.MeshSender, mesh_sockets.MeshReceiver, mesh_sockets.barrier)
        self._hop = MeshHop(runner, setup.identity, setup.fifo_bytes, sockets)
        return self._hop
