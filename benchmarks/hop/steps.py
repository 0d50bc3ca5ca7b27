"""Steps with hidden states of DeepSeek-V3's size, the terms of links that carry them, and what framing them costs."""

import secrets
import time

import msgspec

from actors.sockets.frames import BufferPool, FrameReader, encode
from actors.sockets.host import Terms
from stages.step import Mode, Segment, Step

BYTES_PER_TOKEN = 2 * 7168
"""A hidden state of DeepSeek-V3 in bfloat16."""

DTYPE = "bfloat16"

DECODED_MAX = 32
"""The most users of a decode step; more tokens are a chunk of one prompt."""

EPOCH = 1


class Secret(msgspec.Struct, frozen=True):
    """The secret by which the processes of one run recognise each other."""

    value: bytes

    @classmethod
    def new(cls) -> "Secret":
        """Creates a random secret."""
        return cls(secrets.token_bytes(32))

    def terms(self, name: str, peer: str) -> Terms:
        """The terms of a link that carries hidden states from `name` to `peer`."""
        return Terms(epoch=EPOCH, secret=self.value, name=name, peer=peer, dtype=DTYPE, bytes_per_token=BYTES_PER_TOKEN)


def step_of(step_id: int, tokens: int) -> Step:
    """Makes a decode step of one token for each of up to DECODED_MAX users, or a prefill step with one chunk."""
    is_decode = tokens <= DECODED_MAX
    parts = [[7]] * tokens if is_decode else [list(range(tokens))]
    segments = [
        Segment(slot=slot, start=512, tokens=part, new_blocks=[], sample=True) for slot, part in enumerate(parts)
    ]
    mode: Mode = "decode" if is_decode else "prefill"
    return Step(epoch=EPOCH, step_id=step_id, mode=mode, segments=segments, admissions=[], ended=[])


class Framing:
    """What a link computes for a frame, without sockets and wake-ups, in a loop that keeps the processor's caches warm.

    It encodes a step and decodes it again; moving the bytes, which the kernel would do, is not counted.
    """

    def __init__(self) -> None:
        self._reader = FrameReader(BYTES_PER_TOKEN, BufferPool())
        self._reader.established()

    def seconds(self, tokens: int, count: int) -> list[float]:
        """The seconds of each of `count` steps of `tokens` tokens."""
        step, hidden = step_of(0, tokens), bytes(tokens * BYTES_PER_TOKEN)
        return [self._frame_seconds(step, hidden) for _ in range(count)]

    def _frame_seconds(self, step: Step, hidden: bytes) -> float:
        began = time.perf_counter()
        head = encode(step, step.epoch, len(hidden))
        taken = time.perf_counter() - began
        stream = memoryview(head + hidden)
        while stream:
            buffer = self._reader.buffer()
            count = min(len(buffer), len(stream))
            buffer[:count] = stream[:count]
            stream = stream[count:]
            began = time.perf_counter()
            for frame in self._reader.received(count):
                frame.lease.release()
            taken += time.perf_counter() - began
        return taken
