"""A stage at work: one thread that moves bytes, one that computes, and answers about both at any time."""

from collections.abc import Callable
from concurrent.futures import Future

from actors.errors import LinkError
from actors.sockets.listener import Address
from actors.stage.compute import ComputeQueue, ComputeThread, MakeRunner
from actors.stage.health import StageHealth
from actors.stage.links import StageLinks
from actors.stage.setup import StageIdentity
from actors.stage.state import StageState
from actors.stage.task import StageTask
from stages.kv.inventory import Inventory
from stages.mesh_spec import MeshSocketSpec

CLOSE_SECONDS = 2.0


class StageServer:
    """Runs one stage between its two links. Its methods may be called from any thread; none of them computes.

    Steps pass from the I/O thread to the compute thread by a queue. After a first failure, which is reported
    downstream, where the engine is, later steps are dropped until the stage is `reset`.
    """

    def __init__(self, identity: StageIdentity) -> None:
        self._state = StageState(identity)
        self._jobs: ComputeQueue = ComputeQueue()
        self._links = StageLinks(self._state, self._jobs.put)
        self._compute = ComputeThread(self._state, self._links, self._jobs)

    def load(self, make_runner: MakeRunner) -> "Future[None]":
        """Starts the compute thread, which makes the runner and keeps it; done when steps can be computed."""
        return self._compute.load(make_runner)

    def call(self, function: Callable[[], None]) -> "Future[None]":
        """Has the compute thread call a function between two steps: what touches a device belongs to that thread."""
        task = StageTask(function, Future())
        self._jobs.put(task)
        return task.done

    def listen(self, address: Address, mesh: MeshSocketSpec | None = None) -> "Future[Address]":
        """Opens the address for the stage before this one, or the engine; gives the address it was bound to.

        `mesh` is the socket by which hidden states come from mesh to mesh, if they do not come with the steps.
        """
        return self._links.listen(address, mesh)

    def connect(self, address: Address, mesh: MeshSocketSpec | None = None) -> "Future[None]":
        """Joins the next stage, or the engine. Ends in LinkError or ProtocolError if that fails."""
        return self._links.connect(address, mesh)

    def reset(self, identity: StageIdentity) -> "Future[None]":
        """Leaves both links and drops every step that came by them; then the stage can be joined anew, as `identity`.

        Done when the threads that compute and sample are free. Ends in LinkError if the stage was closed, or never had
        its weights.
        """
        freed: Future[None] = Future()
        if not self._compute.is_alive or not self._state.begin_leaving():
            freed.set_exception(LinkError("The stage is not there to be joined anew."))
            return freed
        task = StageTask(lambda: self._state.begin_anew(identity), freed, behind_all=True)
        # After the links have ended: the steps that came by them are before the task in the queue, and are dropped.
        self._links.leave(lambda: self._jobs.put(task))
        return freed

    def health(self) -> StageHealth:
        """Returns what the stage is doing at this moment."""
        links = self._links
        return self._state.health(links.received_bytes, links.sent_bytes, links.sent_to)

    def inventory(self, version: int) -> Inventory | None:
        """Returns what the stage keeps beside its device, or what changed of it; None before it is loaded."""
        return self._compute.inventory(version)

    def close(self) -> None:
        """Ends links and threads; a step in progress is waited for only for a moment. May be repeated."""
        if not self._state.close():
            return
        self._links.close(CLOSE_SECONDS)
        self._compute.stop(CLOSE_SECONDS)
        self._links.stop()
