"""What a link computes for a frame, in a loop that keeps the processor's caches warm: no socket, no wake-up."""

import time

from actors.sockets.frames import BufferPool, FrameReader, encode
from benchmarks.hop_steps import BYTES_PER_TOKEN, step_of
from stages.step import Step


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
