"""Writing frames to a socket from two threads, without copying what is large."""

import asyncio
import socket
import threading
from collections import deque
from collections.abc import Callable

Sent = Callable[[], None]


class _Pending:
    """The rest of a frame that did not fit into the socket's buffer."""

    __slots__ = ("parts", "sent")

    def __init__(self, parts: list[memoryview], sent: Sent) -> None:
        self.parts = parts
        self.sent = sent


class FrameWriter:
    """Writes frames in order: in the caller's thread while the socket takes them, and what is left from the loop.

    A frame of a few tokens fits the socket's buffer, so it leaves in one system call with no hand-over to the loop's
    thread, which would cost a wake-up (about 20 us). The socket has to be non-blocking; the writer works on a
    duplicate of it and owns that, so that after a close by the loop no thread writes to a descriptor that was reused.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, connected: socket.socket, lost: Callable[[OSError], None]
    ) -> None:
        self._loop = loop
        self._socket = connected.dup()
        self._lost = lost
        self._lock = threading.Lock()
        self._pending: deque[_Pending] = deque()
        self._is_closed = False
        self.sent_bytes = 0

    def write(self, parts: list[memoryview], sent: Sent) -> bool:
        """Writes one frame; `sent` is called when its memory is no longer needed, even if the connection is lost.

        Returns whether the connection is still there, as far as that is known: the frame may still not come through.
        """
        error: OSError | None = None
        with self._lock:
            if self._pending:
                self._pending.append(_Pending(parts, sent))
                return True
            if not self._is_closed:
                try:
                    parts = self._send(parts)
                except OSError as reset:
                    error = reset
                else:
                    if parts:
                        self._pending.append(_Pending(parts, sent))
                        self._loop.call_soon_threadsafe(self._watch)
                        return True
            is_written = not parts
        sent()
        if error is not None:
            self._loop.call_soon_threadsafe(self._lost, error)
        return is_written

    def close(self) -> None:
        """Drops what is not written yet; belongs to the loop's thread."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._loop.remove_writer(self._socket)
            self._socket.close()
            pending = list(self._pending)
            self._pending.clear()
        for frame in pending:
            frame.sent()

    def _send(self, parts: list[memoryview]) -> list[memoryview]:
        """Writes as much as the socket takes; returns the rest."""
        while parts:
            try:
                count = self._socket.sendmsg(parts, (), socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return parts
            self.sent_bytes += count
            parts = _without(parts, count)
        return parts

    def _watch(self) -> None:
        with self._lock:
            if not self._is_closed:
                self._loop.add_writer(self._socket, self._writable)

    def _writable(self) -> None:
        done: list[Sent] = []
        error: OSError | None = None
        with self._lock:
            try:
                while self._pending:
                    frame = self._pending[0]
                    frame.parts = self._send(frame.parts)
                    if frame.parts:
                        break
                    self._pending.popleft()
                    done.append(frame.sent)
            except OSError as reset:
                error = reset
            if not self._pending or error is not None:
                self._loop.remove_writer(self._socket)
        for sent in done:
            sent()
        if error is not None:
            self._lost(error)


def _without(parts: list[memoryview], count: int) -> list[memoryview]:
    """Returns the parts without their first `count` bytes."""
    for index, part in enumerate(parts):
        if count < len(part):
            return [part[count:], *parts[index + 1 :]]
        count -= len(part)
    return []
