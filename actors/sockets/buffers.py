"""Memory that hidden states are received into, used again and again."""

import mmap
from collections.abc import Callable


class Lease:
    """A buffer in use. `release` gives it back, once; nobody may touch `view` after that."""

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
    """Page-aligned buffers of one link; as many come to exist as are ever leased at once, which credits bound.

    A buffer is replaced by a larger one only when a payload is larger than it, so a running pipeline allocates
    nothing. Leases are made by one thread and may be released by another: a list's append and pop are atomic.
    """

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []
        self._largest = 0

    def lease(self, length: int) -> Lease:
        """A writable view of `length` bytes; nothing is set aside for an empty one."""
        if length == 0:
            return Lease(memoryview(bytearray()), None, self._free.append)
        self._largest = max(self._largest, length)
        buffer = self._free.pop() if self._free else None
        if buffer is None or len(buffer) < length:
            buffer = mmap.mmap(-1, self._largest)
        return Lease(memoryview(buffer)[:length], buffer, self._free.append)
