"""Credits: how many messages may be sent before the receiver has released some of them."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable

from actors.errors import LinkError, ProtocolError
from actors.sockets.frames import LinkMessage
from stages.step import StageFailure


class Credits:
    """A counting semaphore that a thread or a coroutine can wait on, and that ends with its link.

    `grant`, `end` and `take_in_task` belong to the loop's thread, `take_in_thread` to another one. A link uses only one
    of the two, so neither can starve the other.
    """

    def __init__(self) -> None:
        self._count = 0
        self._end: LinkError | None = None
        self._changed = threading.Condition()
        self._waiters: deque[asyncio.Future[None]] = deque()

    def grant(self, count: int) -> None:
        """Adds credits."""
        with self._changed:
            self._count += count
            self._changed.notify(count)
        self._wake(count)

    def end(self, error: LinkError) -> None:
        """Makes every present and future wait raise `error`."""
        with self._changed:
            self._end = self._end or error
            self._changed.notify_all()
        self._wake(len(self._waiters))

    def take_in_thread(self) -> None:
        """Takes one credit, waiting in this thread; the link's end ends the wait. Raises LinkError."""
        with self._changed:
            while not self._try_take():
                self._changed.wait()

    async def take_in_task(self) -> None:
        """Takes one credit, waiting in this task; the link's end ends the wait. Raises LinkError."""
        while not self._try_take():
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter.done() and not waiter.cancelled():
                    self._wake(1)
                raise

    def _try_take(self) -> bool:
        if self._end is not None:
            raise LinkError(str(self._end), self._end.kind) from self._end
        if self._count == 0:
            return False
        self._count -= 1
        return True

    def _wake(self, count: int) -> None:
        while count and self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                count -= 1


class CreditReturns:
    """Gives credits back, half a window at a time: this saves traffic, and the sender never runs out of them."""

    def __init__(self, window: int, give: Callable[[int], None]) -> None:
        self._window = window
        self._give = give
        self._lock = threading.Lock()
        self._held = 0
        self._owed = 0

    def arrived(self, message: LinkMessage) -> None:
        """Counts a message. Raises ProtocolError if the sender had no credit for it."""
        if isinstance(message, StageFailure):
            return
        with self._lock:
            self._held += 1
            if self._held > self._window:
                raise ProtocolError(f"The peer sent more than the {self._window} messages it has credits for.")

    def released(self, message: LinkMessage) -> None:
        """Counts a message that was released."""
        if isinstance(message, StageFailure):
            return
        with self._lock:
            self._held -= 1
            self._owed += 1
            if 2 * self._owed < self._window:
                return
            count, self._owed = self._owed, 0
        self._give(count)
