"""What peers send first to a stage's socket: a right hello, and those that have to be refused."""

import msgspec

from actors.sockets.frames import HEADER, HELLO_BYTES_MAX, MAGIC, PAYLOAD_BYTES_MAX, Hello, Kind, encode
from actors.sockets.host import Terms
from stages.step import PROTOCOL_VERSION
from tests.support.links import UP, hidden, step

NEXT = msgspec.structs.replace(UP, epoch=UP.epoch + 1, secret=b"another secret")
"""The terms that the pipeline has after it was brought back."""


def hello_of(terms: Terms) -> Hello:
    return Hello(
        secret=terms.secret,
        sender=terms.peer,
        receiver=terms.name,
        dtype=terms.dtype,
        bytes_per_token=terms.bytes_per_token,
        credits=0,
    )


def frame_of(kind: Kind, control_length: int, payload_length: int) -> bytes:
    return HEADER.pack(MAGIC, PROTOCOL_VERSION, kind, NEXT.epoch, control_length, payload_length)


GOOD = encode(hello_of(NEXT), NEXT.epoch)
REPLAYED = encode(hello_of(UP), UP.epoch)
UNTRUSTED = {
    "another program": b"GET / HTTP/1.1\r\nHost: stage\r\n\r\n",
    "a pickle": b"\x80\x04\x95\x1b\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
    "the hello of a former epoch": REPLAYED,
    "the hello of a former epoch under this one": encode(hello_of(UP), NEXT.epoch),
    "this epoch's hello under a former one": encode(hello_of(NEXT), UP.epoch),
    "a step without a hello": encode(step(1), NEXT.epoch, UP.bytes_per_token) + hidden(1, 1),
    "a hello of 4 GB": frame_of(Kind.HELLO, (1 << 32) - 1, 0),
    "a hello just too long": frame_of(Kind.HELLO, HELLO_BYTES_MAX + 1, 0),
    "a hello with hidden states": frame_of(Kind.HELLO, 100, PAYLOAD_BYTES_MAX) + bytes(100),
    "a payload of all memory": frame_of(Kind.HELLO, 100, (1 << 64) - 1),
    "rubbish in a hello": frame_of(Kind.HELLO, 100, 0) + b"\xc1" * 100,
}
