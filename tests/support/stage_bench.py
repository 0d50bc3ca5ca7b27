"""A stage server between two links of the test, and runners that fail or wait."""

import asyncio
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec

from actors.clock import now_ns
from actors.sockets.host import HostLink, Terms
from actors.sockets.listener import HostListener, UnixAddress, connect
from actors.stage.health import StageHealth
from actors.stage.runner import StageRunner
from actors.stage.server import StageServer
from actors.stage.setup import StageIdentity, stage_name
from stages.plan import StageSpec
from stages.step import Segment, StageFailure, Step, StepResult
from tests.support.links import Ear
from tests.support.runners import BYTES_PER_TOKEN, EchoRunner

SECONDS = 20
IDENTITY = StageIdentity(
    index=1, stages=3, host="host-a", epoch=4, secret=b"s", dtype="float32", bytes_per_token=BYTES_PER_TOKEN
)


class Raising(EchoRunner):
    """A runner that fails at step 2."""

    def step(self, step: Step, hidden: memoryview) -> memoryview | StepResult:
        if step.step_id == 2:
            raise ZeroDivisionError("one by nought")
        return super().step(step, hidden)


class Waiting(EchoRunner):
    """A runner that computes until `go_on` is set."""

    def __init__(self, spec: StageSpec) -> None:
        super().__init__(spec)
        self.began = threading.Event()
        self.go_on = threading.Event()

    def step(self, step: Step, hidden: memoryview) -> memoryview | StepResult:
        self.began.set()
        if not self.go_on.wait(SECONDS):
            raise TimeoutError
        return super().step(step, hidden)


class Bench:
    """A stage server with the test at both ends: `upstream` sends it steps, `downstream` receives its output."""

    def __init__(
        self, server: StageServer, upstream: HostLink, upstream_ear: Ear, downstream: HostLink, downstream_ear: Ear
    ) -> None:
        self.server = server
        self.upstream = upstream
        self.upstream_ear = upstream_ear
        self.downstream = downstream
        self.downstream_ear = downstream_ear

    async def send(self, step_id: int, tokens: int = 1, *, epoch: int = 4, fill: int = 7) -> None:
        payload = memoryview(bytes([fill]) * (tokens * BYTES_PER_TOKEN))
        sending = asyncio.to_thread(self.upstream.send_from_thread, step(step_id, tokens, epoch), payload, lambda: None)
        await asyncio.wait_for(sending, SECONDS)

    async def failure(self) -> StageFailure:
        message = (await self.downstream_ear.next()).message
        assert isinstance(message, StageFailure)
        return message

    async def health_when(self, is_so: Callable[[StageHealth], bool]) -> StageHealth:
        for _ in range(SECONDS * 100):
            health = self.server.health()
            if is_so(health):
                return health
            await asyncio.sleep(0.01)
        raise TimeoutError(str(self.server.health()))


def neighbours(identity: StageIdentity) -> tuple[Terms, Terms]:
    """The terms of the neighbours' ends: of the link by which steps come to the stage, and of the other one."""
    up, down = identity.upstream_terms(), identity.downstream_terms()
    own = stage_name(identity.index)
    return msgspec.structs.replace(up, name=up.peer, peer=own), msgspec.structs.replace(down, name=down.peer, peer=own)


@asynccontextmanager
async def bench(identity: StageIdentity, runner: StageRunner) -> AsyncIterator[Bench]:
    up, down = neighbours(identity)
    server = StageServer(identity)
    with tempfile.TemporaryDirectory(prefix="stage-") as parent:
        listener = HostListener.open(UnixAddress(f"{parent}/a/down.sock"), down, downstream_ear := Ear())
        await asyncio.wrap_future(server.load(lambda _: runner))
        address = await asyncio.wrap_future(server.listen(UnixAddress(f"{parent}/b/up.sock")))
        upstream = await connect(address, up, upstream_ear := Ear())
        await asyncio.wrap_future(server.connect(listener.address))
        downstream = await asyncio.wait_for(listener.accepted(), SECONDS)
        try:
            yield Bench(server, upstream, upstream_ear, downstream, downstream_ear)
        finally:
            await asyncio.to_thread(server.close)
            upstream.close()
            downstream.close()


async def reset(server: StageServer, identity: StageIdentity) -> None:
    await asyncio.wait_for(asyncio.wrap_future(server.reset(identity)), SECONDS)


async def join(around: Bench, identity: StageIdentity, parent: str) -> Bench:
    """Joins the same server between two new links."""
    up, down = neighbours(identity)
    listener = HostListener.open(UnixAddress(f"{parent}/a/down.sock"), down, downstream_ear := Ear())
    address = await asyncio.wrap_future(around.server.listen(UnixAddress(f"{parent}/b/up.sock")))
    upstream = await connect(address, up, upstream_ear := Ear())
    await asyncio.wrap_future(around.server.connect(listener.address))
    downstream = await asyncio.wait_for(listener.accepted(), SECONDS)
    return Bench(around.server, upstream, upstream_ear, downstream, downstream_ear)


def step(step_id: int, tokens: int = 1, epoch: int = 4) -> Step:
    segment = Segment(slot=0, start=0, tokens=[1] * tokens, new_blocks=[], sample=True)
    return Step(epoch=epoch, step_id=step_id, mode="decode", segments=[segment], admissions=[], ended=[])


def untimed(message: object) -> Step | StepResult:
    """Returns the message without the timing that the server added, which has to be plausible."""
    assert isinstance(message, Step | StepResult)
    (timing,) = message.timings
    assert 0 < timing.received_ns <= timing.began_ns <= timing.ended_ns <= now_ns()
    return msgspec.structs.replace(message, timings=[])


def spec(identity: StageIdentity) -> StageSpec:
    return StageSpec(index=identity.index, stages=identity.stages, first_layer=0, end_layer=1)
