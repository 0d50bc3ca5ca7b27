"""Frames: how messages and hidden states lie on a byte stream. No I/O here.

    magic 4s | version u16 | kind u16 | epoch u64 | control length u32 | payload length u64 | control | payload

Little-endian. Control is msgpack; the payload is the hidden states' bytes, beside a `Step` only, and exactly as long
as its tokens call for. Every length is checked before memory is set aside for it.
"""

import struct
from collections.abc import Generator
from enum import IntEnum

import msgspec

from actors.errors import ProtocolError
from actors.sockets.buffers import BufferPool, Lease
from stages.step import PROTOCOL_VERSION, StageFailure, Step, StepResult

MAGIC = b"GXLN"
HEADER = struct.Struct("<4sHHQIQ")
HELLO_BYTES_MAX = 1 << 10
CONTROL_BYTES_MAX = 1 << 24
PAYLOAD_BYTES_MAX = 1 << 30
STAGING_BYTES = 1 << 15
"""Reads land here unless a large payload is awaited: a small frame then costs one read and a copy of its payload
(0.4 us for 14 KB, less than a second read), and no more than this much of a large payload is ever copied."""
DIRECT_BYTES_MIN = 1 << 12


class Kind(IntEnum):
    """What a frame's control is."""

    HELLO = 1
    CREDIT = 2
    STEP = 3
    RESULT = 4
    FAILURE = 5


class Hello(msgspec.Struct, frozen=True, array_like=True, kw_only=True, forbid_unknown_fields=True):
    """The first frame of each side. Both must agree on everything but their names and `credits`.

    `credits` is how many messages the other side may send before it gets some back; `bytes_per_token` is the length
    of one token's hidden state, 0 where none travel.
    """

    secret: bytes
    sender: str
    receiver: str
    dtype: str
    bytes_per_token: int
    credits: int


class Credit(msgspec.Struct, frozen=True, array_like=True, kw_only=True, forbid_unknown_fields=True):
    """The receiver has done with `count` messages: as many more may be sent."""

    count: int


Message = Step | StepResult | StageFailure
Control = Hello | Credit | Step | StepResult | StageFailure

_KINDS: dict[type[Control], Kind] = {
    Hello: Kind.HELLO,
    Credit: Kind.CREDIT,
    Step: Kind.STEP,
    StepResult: Kind.RESULT,
    StageFailure: Kind.FAILURE,
}
_DECODERS = {kind: msgspec.msgpack.Decoder(control) for control, kind in _KINDS.items()}
_ENCODER = msgspec.msgpack.Encoder()


def encode(control: Control, epoch: int, payload_length: int = 0) -> bytes:
    """Header and control of a frame; `payload_length` bytes have to follow it."""
    body = _ENCODER.encode(control)
    if len(body) > CONTROL_BYTES_MAX or payload_length > PAYLOAD_BYTES_MAX:
        raise ProtocolError(
            f"A {type(control).__name__} of {len(body)} bytes with {payload_length} bytes of hidden states is larger "
            f"than a frame may be ({CONTROL_BYTES_MAX} and {PAYLOAD_BYTES_MAX})."
        )
    kind = _KINDS[type(control)]
    return HEADER.pack(MAGIC, PROTOCOL_VERSION, kind, epoch, len(body), payload_length) + body


class Frame(msgspec.Struct, frozen=True):
    """A frame that has arrived whole. Whoever takes it releases the lease."""

    epoch: int
    control: Control
    lease: Lease


class FrameReader:
    """Takes a byte stream in pieces of any size and gives frames.

    Offer `buffer()` to a read, then call `received(count)`. Until `established` is called only a small `Hello` is let
    through, and after it none. `bytes_per_token` says how long the payload of a `Step` has to be.
    """

    def __init__(self, bytes_per_token: int, pool: BufferPool) -> None:
        self._bytes_per_token = bytes_per_token
        self._pool = pool
        self._is_established = False
        self._staging = memoryview(bytearray(STAGING_BYTES))
        self._staged_from = 0
        self._staged_to = 0
        self._direct: memoryview | None = None
        self._received = 0
        self._frames: list[Frame] = []
        self._parser = self._parse()
        next(self._parser)

    def established(self) -> None:
        """The handshake is done: from here on everything but a `Hello` may come."""
        self._is_established = True

    def buffer(self) -> memoryview:
        """Where the next bytes of the stream belong; never empty."""
        return self._staging if self._direct is None else self._direct

    def received(self, count: int) -> list[Frame]:
        """Takes note of `count` bytes written to `buffer()`; returns the frames that are now complete.

        Raises ProtocolError where the bytes are no frame; the stream is of no use after that.
        """
        self._received = count
        next(self._parser)
        frames, self._frames = self._frames, []
        return frames

    def _parse(self) -> Generator[None, None, None]:
        header = memoryview(bytearray(HEADER.size))
        while True:
            yield from self._fill(header)
            kind, epoch, control_length, payload_length = self._checked(header)
            body = memoryview(bytearray(control_length))
            yield from self._fill(body)
            control = self._decoded(kind, body)
            self._check_payload(control, payload_length)
            lease = self._pool.lease(payload_length)
            yield from self._fill(lease.view)
            self._frames.append(Frame(epoch, control, lease))

    def _fill(self, target: memoryview) -> Generator[None, None, None]:
        """Fills `target` from what is staged, then from the stream: directly where much of it is missing."""
        filled = 0
        while True:
            count = min(len(target) - filled, self._staged_to - self._staged_from)
            target[filled : filled + count] = self._staging[self._staged_from : self._staged_from + count]
            self._staged_from += count
            filled += count
            if filled == len(target):
                return
            if len(target) - filled >= DIRECT_BYTES_MIN:
                self._direct = target[filled:]
                yield
                self._direct = None
                filled += self._received
            else:
                yield
                self._staged_from, self._staged_to = 0, self._received

    def _checked(self, header: memoryview) -> tuple[Kind, int, int, int]:
        magic, version, number, epoch, control_length, payload_length = HEADER.unpack(header)
        if magic != MAGIC:
            raise ProtocolError(f"A frame began with {magic!r} where {MAGIC!r} belongs.")
        if version != PROTOCOL_VERSION:
            raise ProtocolError(f"A peer speaks protocol version {version}; this is version {PROTOCOL_VERSION}.")
        if number not in _DECODERS:
            raise ProtocolError(f"A frame is of the unknown kind {number}.")
        kind = Kind(number)
        if (kind is Kind.HELLO) is self._is_established:
            raise ProtocolError(
                f"A frame of kind {kind.name} came {'after' if kind is Kind.HELLO else 'before'} the handshake."
            )
        control_max = CONTROL_BYTES_MAX if self._is_established else HELLO_BYTES_MAX
        if control_length > control_max or payload_length > PAYLOAD_BYTES_MAX:
            raise ProtocolError(
                f"A frame claims {control_length} bytes of control and {payload_length} of hidden states; at most "
                f"{control_max} and {PAYLOAD_BYTES_MAX} are allowed."
            )
        return kind, epoch, control_length, payload_length

    @staticmethod
    def _decoded(kind: Kind, body: memoryview) -> Control:
        try:
            return _DECODERS[kind].decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ProtocolError(f"The control of a {kind.name} frame cannot be read: {error}.") from error

    def _check_payload(self, control: Control, length: int) -> None:
        tokens = control.token_count if isinstance(control, Step) else 0
        if length != tokens * self._bytes_per_token:
            raise ProtocolError(
                f"A {type(control).__name__} of {tokens} tokens came with {length} bytes of hidden states instead of "
                f"{tokens * self._bytes_per_token}."
            )
