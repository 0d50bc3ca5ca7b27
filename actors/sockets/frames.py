"""Frames: how messages and hidden states are written to a byte stream. Nothing here does I/O.

    magic 4s | version u16 | kind u16 | epoch u64 | control length u32 | payload length u64 | control | payload

Little-endian. Control is msgpack; the payload is the hidden states' bytes, beside a `Step` only, and exactly as long
as its tokens need. Every length is checked before memory is set aside for it.
"""

import mmap
import struct
from collections.abc import Callable
from enum import IntEnum

import msgspec

from actors.errors import ProtocolError
from stages.mesh_spec import MeshSocketSpec
from stages.step import PROTOCOL_VERSION, StageFailure, Step, StepResult


class Lease:
    """A buffer in use. `release` gives it back, once; `view` may not be used after that."""

    __slots__ = ("_buffer", "_give_back", "view")

    def __init__(self, view: memoryview, buffer: mmap.mmap | None, give_back: Callable[[mmap.mmap], None]) -> None:
        self.view = view
        self._buffer = buffer
        self._give_back = give_back

    def release(self) -> None:
        """Gives the buffer back to its pool."""
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            self._give_back(buffer)


class BufferPool:
    """Page-aligned buffers of one link; there are as many as were ever leased at once, a number that credits bound.

    A buffer is replaced by a larger one only when a payload is larger than it, so a running pipeline allocates
    nothing. Leases are made by one thread and may be released by another: a list's append and pop are atomic.
    """

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []
        self._largest = 0

    def lease(self, length: int) -> Lease:
        """Returns a writable view of `length` bytes; nothing is set aside for an empty one."""
        if length == 0:
            return Lease(memoryview(bytearray()), None, self._free.append)
        self._largest = max(self._largest, length)
        buffer = self._free.pop() if self._free else None
        if buffer is None or len(buffer) < length:
            buffer = mmap.mmap(-1, self._largest)
        return Lease(memoryview(buffer)[:length], buffer, self._free.append)


MAGIC = b"GXLN"
HEADER = struct.Struct("<4sHHQIQ")
HELLO_BYTES_MAX = 1 << 10
CONTROL_BYTES_MAX = 1 << 24
PAYLOAD_BYTES_MAX = 1 << 30
STAGING_BYTES = 1 << 15
"""Size of the buffer that reads go to unless a large payload is awaited: a small frame then takes one read and a copy
of its payload (0.4 us for 14 KB, less than a second read), and no more than this of a large payload is ever copied."""
DIRECT_BYTES_MIN = 1 << 12


class Kind(IntEnum):
    """The types of frames, by what their control is."""

    HELLO = 1
    CREDIT = 2
    STEP = 3
    RESULT = 4
    FAILURE = 5
    HEARTBEAT = 6


class Hello(msgspec.Struct, frozen=True, array_like=True, kw_only=True, forbid_unknown_fields=True):
    """The first frame of each side. Both must agree on everything but their names and `credits`.

    `credits` is how many messages the other side may send before it gets some back; `bytes_per_token` is the length
    of one token's hidden state, 0 where none are sent. `mesh` is the socket that carries them instead, if one does.
    """

    secret: bytes
    sender: str
    receiver: str
    dtype: str
    bytes_per_token: int
    credits: int
    mesh: MeshSocketSpec | None = None


class Credit(msgspec.Struct, frozen=True, array_like=True, kw_only=True, forbid_unknown_fields=True):
    """The receiver has released `count` messages: as many more may be sent."""

    count: int


class Heartbeat(msgspec.Struct, frozen=True, array_like=True, kw_only=True, forbid_unknown_fields=True):
    """The sender is alive, and has had nothing else to send for a while."""


LinkMessage = Step | StepResult | StageFailure

Control = Hello | Credit | Heartbeat | Step | StepResult | StageFailure

_KINDS: dict[type[Control], Kind] = {
    Hello: Kind.HELLO,
    Credit: Kind.CREDIT,
    Heartbeat: Kind.HEARTBEAT,
    Step: Kind.STEP,
    StepResult: Kind.RESULT,
    StageFailure: Kind.FAILURE,
}

# By number: to look up an enumeration takes a good part of the time of reading a frame.
_DECODERS: dict[int, msgspec.msgpack.Decoder[Control]] = {
    kind.value: msgspec.msgpack.Decoder(control) for control, kind in _KINDS.items()
}

_HELLO = Kind.HELLO.value

_ENCODER = msgspec.msgpack.Encoder()


def encode(control: Control, epoch: int, payload_length: int = 0) -> bytes:
    """Returns the header and control of a frame; `payload_length` bytes have to follow it."""
    body = _ENCODER.encode(control)
    if len(body) > CONTROL_BYTES_MAX or payload_length > PAYLOAD_BYTES_MAX:
        raise ProtocolError(
            f"A {type(control).__name__} of {len(body)} bytes with {payload_length} bytes of hidden states is larger "
            f"than a frame may be ({CONTROL_BYTES_MAX} and {PAYLOAD_BYTES_MAX})."
        )
    kind = _KINDS[type(control)]
    return HEADER.pack(MAGIC, PROTOCOL_VERSION, kind, epoch, len(body), payload_length) + body


class Frame(msgspec.Struct, frozen=True):
    """A frame that has arrived whole; its receiver releases the lease."""

    epoch: int
    control: Control
    lease: Lease


Header = tuple[int, int, int, int]
"""The beginning of a frame, checked: kind, epoch, control length and payload length."""


class FrameReader:
    """Reads a byte stream that comes in chunks of any size, and returns frames.

    Read into `buffer()`, then call `received(count)`. Until `established` is called only a small `Hello` is let
    through, and after it none. A `Step` has to have a payload of `bytes_per_token` for each of its tokens.
    """

    def __init__(self, bytes_per_token: int, pool: BufferPool) -> None:
        self._bytes_per_token = bytes_per_token
        self._pool = pool
        self._is_established = False
        self._staging = memoryview(bytearray(STAGING_BYTES))
        self._begin = 0
        self._end = 0
        # The frame that has begun: what has been read of it, and where its next bytes belong if not in the staging.
        self._header: Header | None = None
        self._control: Control | None = None
        self._lease: Lease | None = None
        self._large: memoryview | None = None
        self._filled = 0

    def established(self) -> None:
        """Ends the handshake: from here on everything but a `Hello` may come."""
        self._is_established = True

    def buffer(self) -> memoryview:
        """Returns the memory that the next bytes of the stream belong to; it is never empty."""
        if self._large is not None and len(self._large) - self._filled >= DIRECT_BYTES_MIN:
            return self._large[self._filled :]
        return self._staging[self._end :]

    def received(self, count: int) -> list[Frame]:
        """Takes `count` bytes that were written to `buffer()`; returns the frames that are now complete.

        Raises ProtocolError where the bytes are not a frame; the stream cannot be used after that.
        """
        if self._large is not None and len(self._large) - self._filled >= DIRECT_BYTES_MIN:
            self._filled += count
        else:
            self._end += count
        frames = []
        while (frame := self._next()) is not None:
            frames.append(frame)
        rest = self._end - self._begin
        if rest and self._begin:
            self._staging[:rest] = self._staging[self._begin : self._end]
        self._begin, self._end = 0, rest
        return frames

    def _next(self) -> Frame | None:
        """Returns the next frame, if all of it is there; else takes what there is of it."""
        header = self._header
        if header is None:
            if self._end - self._begin < HEADER.size:
                return None
            header = self._header = self._checked()
        kind, epoch, control_length, payload_length = header
        lease = self._lease
        if lease is None:
            body = self._part(control_length)
            if body is None:
                return None
            self._control = _decoded(kind, body)
            self._check_payload(self._control, payload_length)
            lease = self._lease = self._pool.lease(payload_length)
        control = self._control
        if control is None or not self._fill(lease.view):
            return None
        self._header = self._control = self._lease = None
        return Frame(epoch, control, lease)

    def _checked(self) -> Header:
        magic, version, kind, epoch, control_length, payload_length = HEADER.unpack_from(self._staging, self._begin)
        self._begin += HEADER.size
        if magic != MAGIC:
            raise ProtocolError(f"A frame began with {magic!r} where {MAGIC!r} belongs.")
        if version != PROTOCOL_VERSION:
            raise ProtocolError(f"A peer speaks protocol version {version}; this is version {PROTOCOL_VERSION}.")
        if kind not in _DECODERS:
            raise ProtocolError(f"A frame is of the unknown kind {kind}.")
        if (kind == _HELLO) is self._is_established:
            raise ProtocolError(
                f"A frame of kind {Kind(kind).name} came {'after' if kind == _HELLO else 'before'} the handshake."
            )
        control_max = CONTROL_BYTES_MAX if self._is_established else HELLO_BYTES_MAX
        if control_length > control_max or payload_length > PAYLOAD_BYTES_MAX:
            raise ProtocolError(
                f"A frame claims {control_length} bytes of control and {payload_length} of hidden states; at most "
                f"{control_max} and {PAYLOAD_BYTES_MAX} are allowed."
            )
        return kind, epoch, control_length, payload_length

    def _check_payload(self, control: Control, length: int) -> None:
        tokens = control.token_count if isinstance(control, Step) else 0
        if length != tokens * self._bytes_per_token:
            raise ProtocolError(
                f"A {type(control).__name__} of {tokens} tokens came with {length} bytes of hidden states instead of "
                f"{tokens * self._bytes_per_token}."
            )

    def _part(self, length: int) -> memoryview | None:
        """Returns the next `length` bytes, once they are there: in the staging if they fit, else in other memory."""
        if length <= STAGING_BYTES:
            if self._end - self._begin < length:
                return None
            self._begin += length
            return self._staging[self._begin - length : self._begin]
        part = memoryview(bytearray(length)) if self._large is None else self._large
        return part if self._fill(part) else None

    def _fill(self, target: memoryview) -> bool:
        """Moves what is staged to `target`; returns whether it is full. If not, its next bytes are read into it."""
        count = min(len(target) - self._filled, self._end - self._begin)
        target[self._filled : self._filled + count] = self._staging[self._begin : self._begin + count]
        self._begin += count
        self._filled += count
        if self._filled < len(target):
            self._large = target
            return False
        self._large = None
        self._filled = 0
        return True


def _decoded(kind: int, body: memoryview) -> Control:
    try:
        return _DECODERS[kind].decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"The control of a {Kind(kind).name} frame cannot be read: {error}.") from error
