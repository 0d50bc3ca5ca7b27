"""Whether the other end of a link still lives: a sign of life from each side, and a limit to silence."""

import asyncio
from collections.abc import Callable

BEATS = 6
"""Signs of life within the time after which silence is a loss."""


class HeartbeatMonitor:
    """Sends a sign of life at a steady rate, and tells when none has come for `silence_s` seconds.

    Silence is counted in turns of this side's own loop: where this process, or the whole machine, stood still, the
    peer gets as many turns to be heard as ever. Belongs to the loop.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        silence_s: float,
        beat: Callable[[], None],
        fell_silent: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._interval_s = silence_s / BEATS
        self._beat = beat
        self._fell_silent = fell_silent
        self._missed = 0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begins to send, and to listen."""
        self._timer = self._loop.call_later(self._interval_s, self._turn)

    def heard(self) -> None:
        """Something has come from the peer."""
        self._missed = 0

    def stop(self) -> None:
        """Ends both."""
        if self._timer is not None:
            self._timer.cancel()

    def _turn(self) -> None:
        self._missed += 1
        if self._missed > BEATS:
            self._fell_silent()
            return
        self._beat()
        self._timer = self._loop.call_later(self._interval_s, self._turn)
