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
"""Users of a decode step; more tokens than this are one prompt's chunk."""

EPOCH = 1


class Secret(msgspec.Struct, frozen=True):
    """What the processes of one run know each other by."""

    value: bytes

    @classmethod
    def new(cls) -> "Secret":
        """One that nobody can guess."""
        return cls(secrets.token_bytes(32))

    def terms(self, name: str, peer: str) -> Terms:
        """The terms of a link that carries hidden states."""
        return Terms(epoch=EPOCH, secret=self.value, name=name, peer=peer, dtype=DTYPE, bytes_per_token=BYTES_PER_TOKEN)


def step_of(step_id: int, tokens: int) -> Step:
    """A decode step of one token for each of up to DECODED_MAX users, or a chunk of a prompt."""
    is_decode = tokens <= DECODED_MAX
    parts = [[7]] * tokens if is_decode else [list(range(tokens))]
    segments = [
        Segment(slot=slot, start=512, tokens=part, new_blocks=[], sample=True) for slot, part in enumerate(parts)
    ]
    mode: Mode = "decode" if is_decode else "prefill"
    return Step(epoch=EPOCH, step_id=step_id, mode=mode, segments=segments, admissions=[], ended=[])


class Framing:
    """Encodes a step and reads it again; what the kernel would do, moving the bytes, is not counted."""

    def __init__(self) -> None:
        self._reader = FrameReader(BYTES_PER_TOKEN, BufferPool())
        self._reader.established()

    def seconds(self, tokens: int, count: int) -> list[float]:
        """Of each of `count` steps of so many tokens."""
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
