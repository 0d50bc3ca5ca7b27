"""SIGINT and SIGTERM as events of the asyncio loop, so that a process ends what it has started before it ends."""

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog

from api.errors import StoppedError

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


log = structlog.get_logger()


class StopSignals:
    """The signals that have come: with the first one work is to end, with another one at once."""

    def __init__(self) -> None:
        self.first: int | None = None
        self.asked = asyncio.Event()
        self.forced = asyncio.Event()

    def note(self, number: int) -> None:
        """Records a signal, and logs it, so that whoever has pressed Ctrl-C sees that it was heard."""
        name = signal.Signals(number).name
        if self.first is None:
            self.first = number
            self.asked.set()
            log.info("stopping; another signal stops at once", signal=name)
        else:
            self.forced.set()
            log.info("stopping at once", signal=name)

    @property
    def error(self) -> StoppedError:
        """The error that the command ends with. Only after a signal."""
        if self.first is None:
            raise ValueError("no signal has come")
        return StoppedError(self.first)


@contextmanager
def on_stop_signal(stop: Callable[[int], object]) -> Iterator[None]:
    """Calls `stop` on the running loop with the number of every SIGINT and SIGTERM, in place of their usual effect.

    Signals come to the main thread; on any other thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, stop, number)
    try:
        yield
    finally:
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)
