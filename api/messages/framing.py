"""Frames over a stream socket: four bytes of length, little-endian, then that many bytes of msgpack."""

import asyncio
from collections.abc import Callable
from typing import cast

import msgspec

from actors.errors import ProtocolError

LENGTH_BYTES = 4
FRAME_BYTES_MAX = 1 << 26
"""The longest frame accepted: far above any message, as a prompt of 163 840 tokens takes less than a megabyte."""


class Framing(asyncio.Protocol):
    """One end of a connection of frames.

    `on_frame` is called with each frame's bytes, valid during the call; `lost` is set when the connection is gone.
    """

    def __init__(self, on_frame: Callable[[memoryview], None]) -> None:
        self.on_frame = on_frame
        self.lost = asyncio.Event()
        self._encoder = msgspec.msgpack.Encoder()
        self._rest = b""
        self._transport: asyncio.Transport | None = None

    def send(self, message: msgspec.Struct) -> None:
        """Sends a message; does nothing once the connection is gone or closing."""
        if self._transport is not None and not self._transport.is_closing():
            frame = self._encoder.encode(message)
            self._transport.write(len(frame).to_bytes(LENGTH_BYTES, "little") + frame)

    def finish(self) -> None:
        """Ends the sending direction, and drops what still comes. The other end closes the connection when it has read
        everything.

        If this end closed it, the last frames could be lost: the other end stops reading once it fails to write.
        """
        self.on_frame = lambda _: None
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write_eof()

    def close(self) -> None:
        """Closes the connection when everything is sent; `lost` is set then."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        received = memoryview(self._rest + data if self._rest else data)
        start = 0
        while len(received) - start >= LENGTH_BYTES:
            length = int.from_bytes(received[start : start + LENGTH_BYTES], "little")
            if length > FRAME_BYTES_MAX:
                raise ProtocolError(f"A frame of {length} bytes was announced; at most {FRAME_BYTES_MAX} are allowed.")
            end = start + LENGTH_BYTES + length
            if end > len(received):
                break
            self.on_frame(received[start + LENGTH_BYTES : end])
            start = end
        self._rest = bytes(received[start:])

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()
