"""What stages and the engine need of a connection, whatever it is made of."""

from collections.abc import Callable
from typing import Protocol

import msgspec

from actors.errors import LinkError
from actors.sockets.frames import LinkMessage


class Arrival(msgspec.Struct, frozen=True):
    """A message with its payload: hidden states as bytes of [tokens, hidden_size] beside a `Step`, else empty.

    The payload may be written to. `release` is called once, by any thread, when nobody needs the payload any more: its
    memory is used again then, and the sender gets a credit back.
    """

    message: LinkMessage
    payload: memoryview
    release: Callable[[], None]


class LinkEvents(Protocol):
    """The reader of a link; its methods are called on the link's own loop, so they may not block."""

    def arrived(self, arrival: Arrival) -> None:
        """Takes the next message, in the order of sending."""

    def lost(self, error: LinkError) -> None:
        """Called when the connection ended without our closing it; nothing arrives after that."""


class EpochEvents:
    """The events of a link that belongs to one epoch of its owner; in another epoch they are dropped.

    `arrived` and `lost` are the owner's methods. Without `arrived`, only credits are expected and messages are dropped.
    """

    def __init__(
        self,
        current_epoch: Callable[[], int],
        lost: Callable[[LinkError], None],
        arrived: Callable[[Arrival], None] | None = None,
    ) -> None:
        self._current_epoch = current_epoch
        self._epoch = current_epoch()
        self._lost = lost
        self._arrived = arrived

    def arrived(self, arrival: Arrival) -> None:
        """See `LinkEvents`."""
        if self._arrived is None or self._current_epoch() != self._epoch:
            arrival.release()
        else:
            self._arrived(arrival)

    def lost(self, error: LinkError) -> None:
        """See `LinkEvents`."""
        if self._current_epoch() == self._epoch:
            self._lost(error)


class EngineLinks(msgspec.Struct, frozen=True, kw_only=True):
    """The engine's side of its two links in one epoch: the secret both ends need, and who gets the events of each.

    `downstream` is the link to the first stage, by which steps leave; `upstream` that from the last stage, by which
    results come.
    """

    epoch: int
    secret: bytes
    downstream: LinkEvents
    upstream: LinkEvents


class Link(Protocol):
    """The sending half of a connection. Steps and results take a credit; failures do not."""

    peer: str

    def send_from_thread(self, message: LinkMessage, payload: memoryview, sent: Callable[[], None]) -> None:
        """Sends from a thread that is not the loop's; waits there for a credit, until there is one or the link ends.

        `sent` is called by either thread when `payload` is no longer needed. Raises LinkError if the link is lost, in
        which case `sent` is called as well.
        """

    async def send(self, message: LinkMessage) -> None:
        """Sends a message without payload from the loop's thread; waits for a credit. Raises LinkError."""

    def post(self, message: LinkMessage) -> None:
        """Sends a failure from either thread, without a credit; does nothing if the link is lost."""

    def close(self) -> None:
        """Ends the connection; called on the loop's thread, any number of times. `lost` is not called."""


def free_nothing() -> None:
    """The `sent` callback of messages whose memory nobody waits for."""
