"""What stages and the engine need of a connection, whatever it is made of."""

from collections.abc import Callable
from typing import Protocol

import msgspec

from actors.errors import LinkError
from actors.sockets.frames import Message


class Arrival(msgspec.Struct, frozen=True):
    """A message with its payload: hidden states as bytes of [tokens, hidden_size] beside a `Step`, else empty.

    The payload may be written to. `release` says that nobody needs it any more: its memory is used again, and the
    sender gets a credit back. It is called once, by any thread.
    """

    message: Message
    payload: memoryview
    release: Callable[[], None]


class LinkEvents(Protocol):
    """Whoever reads from a link; called on the link's own loop, so neither method may block."""

    def arrived(self, arrival: Arrival) -> None:
        """The next message, in the order of sending."""

    def lost(self, error: LinkError) -> None:
        """The connection ended without our closing it; nothing arrives after that."""


class Link(Protocol):
    """The sending half of a connection. Steps and results take a credit; failures do not."""

    peer: str

    def send_from_thread(self, message: Message, payload: memoryview, sent: Callable[[], None]) -> None:
        """Sends from a thread that is not the loop's; waits there for a credit, until there is one or the link ends.

        `sent` is called by either thread when `payload` is no longer needed. Raises LinkError if the link is lost, in
        which case `sent` is called as well.
        """

    async def send(self, message: Message) -> None:
        """Sends a message without payload from the loop's thread; waits for a credit. Raises LinkError."""

    def post(self, message: Message) -> None:
        """Sends a failure from either thread, without a credit; does nothing if the link is lost."""

    def close(self) -> None:
        """Ends the connection; called on the loop's thread, any number of times. `lost` is not called."""
