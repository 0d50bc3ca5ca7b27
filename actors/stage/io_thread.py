"""The thread that moves a stage's bytes."""

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import TypeVar

import uvloop

Result = TypeVar("Result")

STOP_SECONDS = 2.0


class IoThread:
    """A thread with a uvloop loop that coroutines can be sent to."""

    def __init__(self, name: str) -> None:
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"{name} I/O", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[None, None, Result]) -> "Future[Result]":
        """Starts the coroutine on the loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def stop(self) -> None:
        """Ends the loop and its thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(STOP_SECONDS)
        if not self._thread.is_alive():
            self._loop.close()
