"""Heartbeats: each end of a link sends some, and considers the other end lost when none come."""

import asyncio
from collections.abc import Callable

BEATS = 6
"""Heartbeats within the time after which silence is a loss."""


class HeartbeatMonitor:
    """Calls `beat` at a steady rate, and `fell_silent` when nothing has come from the peer for `silence_s` seconds.

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
        """Begins to send heartbeats, and to count silent turns."""
        self._timer = self._loop.call_later(self._interval_s, self._turn)

    def heard(self) -> None:
        """Called when something has come from the peer."""
        self._missed = 0

    def stop(self) -> None:
        """Ends what `start` began."""
        if self._timer is not None:
            self._timer.cancel()

    def _turn(self) -> None:
        self._missed += 1
        if self._missed > BEATS:
            self._fell_silent()
            return
        self._beat()
        self._timer = self._loop.call_later(self._interval_s, self._turn)
