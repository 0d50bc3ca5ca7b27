"""The record of what went through a stage's mesh sockets, and whether both ends of each step are a pair.

A mesh socket does not know what it carries: a tensor of another shape, or one too few, would be taken for what it is
not. So every step's frame says what was sent beside it, and the receiver holds that against what it expects.
"""

from collections import deque
from typing import Literal

import msgspec

from actors.errors import ProtocolError
from stages.mesh_spec import HiddenShard
from stages.step import SentHidden, Step

KEPT = 1024
"""Passages that a stage remembers."""

Direction = Literal["send", "receive"]


class Passage(msgspec.Struct, frozen=True):
    """One tensor through one socket: whom it went to or came from, and the `sequence`-th of that socket."""

    socket: str
    direction: Direction
    peer: str
    sent: SentHidden


class PassageLog:
    """What one end of one socket has carried. Used by one thread; others may read `latest`."""

    def __init__(self, socket: str, direction: Direction, peer: str) -> None:
        self._socket = socket
        self._direction = direction
        self._peer = peer
        self._count = 0
        self.latest: deque[Passage] = deque(maxlen=KEPT)

    def note(self, step_id: int, tensor: HiddenShard) -> SentHidden:
        """Counts a tensor."""
        self._count += 1
        sent = SentHidden(sequence=self._count, step_id=step_id, tensor=tensor)
        self.latest.append(Passage(self._socket, self._direction, self._peer, sent))
        return sent

    def check(self, step: Step, expected: HiddenShard) -> None:
        """Raises ProtocolError unless the step's sender has sent just what comes next here."""
        wanted = SentHidden(sequence=self._count + 1, step_id=step.step_id, tensor=expected)
        if step.sent == wanted:
            return
        told = "nothing" if step.sent is None else str(step.sent)
        raise ProtocolError(f"{self._peer} sent {told} through {self._socket} where {wanted} belongs.")
