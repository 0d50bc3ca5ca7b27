"""The Ray actor around a stage server: it sets its process up, and passes calls on.

Nothing here may import torch: the actor's environment has to be set before that happens.
"""

import asyncio
import os

import msgspec
import structlog

from actors.cores import apply_share, share_cores
from actors.health import StageHealth
from actors.log import configure_logging
from actors.options import Device
from actors.runner import OnProgress, StageRunner, runner_factory
from actors.sockets.address import Address
from actors.stage_identity import StageIdentity
from actors.stage_server import StageServer
from stages.options import DEVICE_VARIABLE, StageOptions
from stages.plan import StageSpec


class StageSetup(msgspec.Struct, frozen=True, kw_only=True):
    """All that an actor is told. It is the `neighbour`-th of `neighbours` stages on its host and owns `rows` there."""

    identity: StageIdentity
    spec: StageSpec
    options: StageOptions
    device: Device
    runner: str
    rows: list[int]
    neighbour: int
    neighbours: int


class StageActor:
    """One stage of a pipeline in a process of its own. Asynchronous, so that health is answered at any time."""

    def __init__(self, setup: StageSetup) -> None:
        configure_logging()
        os.environ[DEVICE_VARIABLE] = setup.device
        shares = share_cores(sorted(os.sched_getaffinity(0)), setup.neighbours)
        apply_share(shares[setup.neighbour], os.environ)
        self._setup = setup
        self._server = StageServer(setup.identity)
        structlog.get_logger().info(
            "stage starts", stage=setup.spec.index, rows=setup.rows, threads=shares[setup.neighbour].threads
        )

    async def load(self) -> None:
        """Loads the stage's weights; `health` tells the progress. Raises what loading raises."""
        await asyncio.wrap_future(self._server.load(self._make_runner))

    async def listen(self, address: Address) -> Address:
        """Opens the address for the stage before; returns the one it was bound to. Raises LinkError."""
        return await asyncio.wrap_future(self._server.listen(address))

    async def connect(self, address: Address) -> None:
        """Joins the next stage or the engine. Raises LinkError or ProtocolError."""
        await asyncio.wrap_future(self._server.connect(address))

    async def health(self) -> StageHealth:
        """What the stage is doing at this moment."""
        return self._server.health()

    async def close(self) -> None:
        """Ends links and threads."""
        await asyncio.to_thread(self._server.close)

    def _make_runner(self, on_progress: OnProgress) -> StageRunner:
        make = runner_factory(self._setup.runner)
        return make(self._setup.spec, self._setup.options, on_progress)
