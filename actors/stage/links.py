"""A stage's links to its neighbours, and the thread that moves their bytes."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import TypeVar

import msgspec
import structlog
import uvloop

from actors.clock import now_ns
from actors.errors import LinkError
from actors.sockets.host import HostLink
from actors.sockets.link import Arrival, EpochEvents
from actors.sockets.listener import Address, HostListener, connect
from actors.stage.setup import stage_name
from actors.stage.state import StageState
from stages.mesh_spec import MeshSocketSpec
from stages.step import FailureKind, StageFailure, Step

Result = TypeVar("Result")

STOP_SECONDS = 2.0


class IoThread:
    """A thread with a uvloop loop that coroutines can be sent to."""

    def __init__(self, name: str) -> None:
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"{name} I/O", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[None, None, Result]) -> "Future[Result]":
        """Starts the coroutine on the loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def stop(self) -> None:
        """Ends the loop and its thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(STOP_SECONDS)
        if not self._thread.is_alive():
            self._loop.close()


class ReceivedStep(msgspec.Struct, frozen=True):
    """A step with its hidden states, and when it came."""

    step: Step
    arrival: Arrival
    received_ns: int


class StageLinks:
    """The link from upstream, by which steps come, and the link downstream, by which the stage's output leaves.

    The public methods may be called from any thread; everything else runs on the I/O thread. Steps go to `put_step`,
    failures from upstream are passed on downstream, where the engine is.
    """

    def __init__(self, state: StageState, put_step: Callable[[ReceivedStep], None]) -> None:
        self._state = state
        self._put_step = put_step
        self._log = structlog.get_logger().bind(stage=state.identity.index)
        self._io = IoThread(stage_name(state.identity.index))
        # Another one each time the stage leaves its links: what was being joined then comes too late.
        self._joining = object()
        self._listener: HostListener | None = None
        self._upstream: HostLink | None = None
        self._downstream: HostLink | None = None
        self._downstream_address = ""

    @property
    def downstream(self) -> HostLink | None:
        """The link to the next stage, or to the engine, once it is joined."""
        return self._downstream

    @property
    def received_bytes(self) -> int:
        """What has come by the link from upstream."""
        upstream = self._upstream
        return 0 if upstream is None else upstream.received_bytes

    @property
    def sent_bytes(self) -> int:
        """What has gone by the link downstream, to `sent_to`."""
        downstream = self._downstream
        return 0 if downstream is None else downstream.sent_bytes

    @property
    def sent_to(self) -> str:
        """The address of the latest link downstream: a socket's path or HOST:PORT."""
        return self._downstream_address

    def listen(self, address: Address, mesh: MeshSocketSpec | None) -> "Future[Address]":
        """Opens the address for the upstream neighbour; gives the address it was bound to."""
        return self._io.run(self._listen(address, mesh))

    def connect(self, address: Address, mesh: MeshSocketSpec | None) -> "Future[None]":
        """Joins the downstream neighbour. Ends in LinkError or ProtocolError if that fails."""
        return self._io.run(self._connect(address, mesh))

    def leave(self, then: Callable[[], None]) -> None:
        """Ends both links; calls `then` on the I/O thread when nothing more comes by them."""
        self._io.run(self._leave(then))

    def close(self, timeout_s: float) -> None:
        """Ends both links, within `timeout_s`; the I/O thread still runs."""
        self._io.run(self._close_links()).result(timeout_s)

    def stop(self) -> None:
        """Ends the I/O thread."""
        self._io.stop()

    def report_failure(self, kind: FailureKind, cause: str, step_id: int | None = None) -> None:
        """Fails the stage, and reports that downstream; does nothing where it has failed already.

        `step_id` is the step that failed, without which it is the one that the stage works on.
        """
        step_id = self._state.failed_step if step_id is None else step_id
        if not self._state.fail(kind, cause):
            return
        # At every end of a pipeline links are lost too; where that was not meant, the engine's record says so.
        log = self._log.info if kind == "lost_link" else self._log.error
        log("stage failed", kind=kind, step_id=step_id, cause=cause)
        if self._downstream is not None:
            identity = self._state.identity
            self._downstream.post(
                StageFailure(
                    epoch=identity.epoch,
                    stage=identity.index,
                    host=identity.host,
                    step_id=step_id,
                    kind=kind,
                    cause=cause,
                )
            )

    # The I/O thread

    async def _listen(self, address: Address, mesh: MeshSocketSpec | None) -> Address:
        events = EpochEvents(self._current_epoch, self._lose_upstream, self._handle_arrival)
        self._listener = HostListener.open(address, self._state.identity.upstream_terms(mesh), events)
        self._accepting = asyncio.create_task(self._accept(self._listener))
        return self._listener.address

    async def _accept(self, listener: HostListener) -> None:
        joining = self._joining
        link = await listener.accepted()
        if joining is self._joining:
            self._upstream = link
        else:
            link.close()

    async def _connect(self, address: Address, mesh: MeshSocketSpec | None) -> None:
        joining = self._joining
        events = EpochEvents(self._current_epoch, self._lose_downstream)
        link = await connect(address, self._state.identity.downstream_terms(mesh), events)
        if joining is not self._joining:
            # The stage has left the chain meanwhile, and is or will be joined to another peer.
            link.close()
            raise LinkError("The stage left its links while it was being joined.")
        self._downstream = link
        self._downstream_address = str(address)

    async def _leave(self, then: Callable[[], None]) -> None:
        await self._close_links()
        self._listener = self._upstream = self._downstream = None
        then()

    async def _close_links(self) -> None:
        self._joining = object()
        if self._listener is not None:
            self._listener.close()
        for link in (self._upstream, self._downstream):
            if link is not None:
                link.close()

    def _handle_arrival(self, arrival: Arrival) -> None:
        """Takes a message from upstream: steps are for the compute thread, failures for the engine."""
        message = arrival.message
        if isinstance(message, Step):
            self._state.received_step = message.step_id
            self._put_step(ReceivedStep(message, arrival, now_ns()))
            return
        arrival.release()
        if isinstance(message, StageFailure) and self._downstream is not None:
            self._downstream.post(message)

    def _lose_upstream(self, error: LinkError) -> None:
        """Reports the loss to the engine, unless it is the engine that left: nothing more will come."""
        self.report_failure(_kind(error), str(error))

    def _lose_downstream(self, error: LinkError) -> None:
        """Closes the link from upstream, as nothing can be reported downstream: so the engine learns of the loss."""
        self.report_failure(_kind(error), str(error))
        if self._listener is not None:
            self._listener.close()
        if self._upstream is not None:
            self._upstream.close()

    def _current_epoch(self) -> int:
        return self._state.epoch


def _kind(error: LinkError) -> FailureKind:
    return "lost_link" if error.kind == "lost" else "error"
