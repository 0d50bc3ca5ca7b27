"""Hidden states from mesh to mesh: a runner between the socket from the mesh before and the one to the mesh after.

Steps, results and failures stay on the host sockets. A step's tensor is sent before its frame, so a stage that
has the frame may wait for the tensor.
"""

from collections import deque
from collections.abc import Callable
from typing import Any, Literal, Protocol

import msgspec

from actors.errors import ProtocolError
from actors.stage.runner import MeshRunner
from actors.stage.setup import StageIdentity, stage_name
from stages.errors import StepError
from stages.kv.inventory import Inventory
from stages.mesh_spec import HiddenShard, MeshSocketSpec
from stages.pending import PendingResult, StageOutput
from stages.step import SentHidden, Step, StepResult

KEPT = 1024
"""Transfers that a stage remembers of each socket."""

Direction = Literal["send", "receive"]


class Transfer(msgspec.Struct, frozen=True):
    """One tensor through one socket: which peer it went to or came from, and its number on that socket."""

    socket: str
    direction: Direction
    peer: str
    sent: SentHidden


class TransferLog:
    """The tensors that one end of one socket has carried. Used by one thread; others may read `latest`."""

    def __init__(self, socket: str, direction: Direction, peer: str) -> None:
        self._socket = socket
        self._direction = direction
        self._peer = peer
        self._count = 0
        self.latest: deque[Transfer] = deque(maxlen=KEPT)

    def note(self, step_id: int, tensor: HiddenShard) -> SentHidden:
        """Counts a tensor, and records it."""
        self._count += 1
        sent = SentHidden(sequence=self._count, step_id=step_id, tensor=tensor)
        self.latest.append(Transfer(self._socket, self._direction, self._peer, sent))
        return sent

    def check(self, step: Step, expected: HiddenShard) -> None:
        """Raises ProtocolError unless the step's sender has sent exactly the tensor that comes next here."""
        wanted = SentHidden(sequence=self._count + 1, step_id=step.step_id, tensor=expected)
        if step.sent == wanted:
            return
        sent = "nothing" if step.sent is None else str(step.sent)
        raise ProtocolError(f"{self._peer} sent {sent} through {self._socket} where {wanted} belongs.")


class Sender(Protocol):
    """The sending end of a mesh socket."""

    def send(self, tensor: Any) -> HiddenShard:
        """Sends a tensor on and returns its shape and dtype."""


class Receiver(Protocol):
    """The receiving end of a mesh socket."""

    def receive(self, what: HiddenShard) -> Any:
        """Waits for the next tensor, of this shape and dtype."""


class Sockets(msgspec.Struct, frozen=True):
    """How mesh sockets are made: by `stages.backend.mesh_sockets`, or by a test."""

    sender: Callable[[Any, MeshSocketSpec, int, int], Sender]
    receiver: Callable[[Any, MeshSocketSpec, int, int], Receiver]
    barrier: Callable[[], None]


class MeshHop:
    """A `StageRunner` that receives hidden states from the mesh before, and sends them to the one after.

    All its methods but `transfers` belong to the thread that computes. Mesh ids are the stages' indices.
    """

    def __init__(self, runner: MeshRunner, identity: StageIdentity, fifo_bytes: int, sockets: Sockets) -> None:
        self._runner = runner
        self._index = identity.index
        self._is_last = identity.is_last
        self._sockets = sockets
        self.spec = MeshSocketSpec.between_equals(runner.hidden_spec(), fifo_bytes)
        self._receiver: Receiver | None = None
        self._sender: Sender | None = None
        here = stage_name(self._index)
        before, after = stage_name(self._index - 1), stage_name(self._index + 1)
        self._received = TransferLog(f"{before} -> {here}", "receive", before)
        self._sent = TransferLog(f"{here} -> {after}", "send", after)

    def open_sockets(self) -> None:
        """Makes both sockets, each of which waits for its other end; the first stage's is made first."""
        device, index = self._runner.mesh_device, self._index
        if index:
            self._receiver = self._sockets.receiver(device, self.spec, index - 1, index)
        if not self._is_last:
            self._sender = self._sockets.sender(device, self.spec, index, index + 1)

    def barrier(self) -> None:
        """Waits until all stages have all their sockets: nothing may be sent before."""
        self._sockets.barrier()

    def step(self, step: Step, hidden: memoryview) -> StageOutput:
        """Runs one step; see `StageRunner`. Returns what was sent on, an empty view where that was nothing.

        Raises ProtocolError where the stage before has not sent what the step needs.
        """
        expected = self._runner.step_hidden_spec(step)
        output = self._runner.step_on_mesh(step, self._receive(step, expected))
        if isinstance(output, StepResult | PendingResult):
            return output
        return memoryview(b"") if expected is None else self._send(step, expected, output)

    def load_blocks(self, step: Step) -> list[int]:
        """See `StageRunner`."""
        return self._runner.load_blocks(step)

    def inventory(self, version: int) -> Inventory:
        """See `StageRunner`."""
        return self._runner.inventory(version)

    def transfers(self) -> list[Transfer]:
        """Returns the latest that were received, then the latest that were sent."""
        return [*self._received.latest, *self._sent.latest]

    def close(self) -> None:
        """Releases the sockets, then devices and memory."""
        self._receiver = self._sender = None
        self._runner.close()

    def _receive(self, step: Step, expected: HiddenShard | None) -> Any:
        if self._receiver is None or expected is None:
            return None
        self._received.check(step, expected)
        tensor = self._receiver.receive(expected)
        self._received.note(step.step_id, expected)
        return tensor

    def _send(self, step: Step, expected: HiddenShard, tensor: Any) -> SentHidden:
        if self._sender is None:
            raise StepError(f"Step {step.step_id} came to {stage_name(self._index)} before its sockets were made.")
        sent = self._sender.send(tensor)
        if sent != expected:
            raise StepError(f"Step {step.step_id} gave {sent} on each chip, where {expected} was agreed.")
        return self._sent.note(step.step_id, sent)
