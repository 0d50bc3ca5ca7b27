"""Event loops for tests: uvloop, on which the sockets run in operation, and one whose time the test moves on."""

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import ParamSpec, cast

import uvloop

SECONDS_MAX = 60
Parameters = ParamSpec("Parameters")
AsyncTest = Callable[Parameters, Coroutine[None, None, None]]
Test = Callable[Parameters, None]


def within(seconds: float) -> Callable[[AsyncTest[Parameters]], Test[Parameters]]:
    """Runs an async test on a uvloop loop of its own, for so long at most."""

    def decorate(test: AsyncTest[Parameters]) -> Test[Parameters]:
        @functools.wraps(test)
        def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
            async def bounded() -> None:
                await asyncio.wait_for(test(*args, **kwargs), seconds)

            uvloop.run(bounded())

        return run

    return decorate


def on_uvloop(test: AsyncTest[Parameters]) -> Test[Parameters]:
    """Runs an async test on a uvloop loop of its own, for a minute at most."""
    return within(SECONDS_MAX)(test)


class SkippingLoop(asyncio.SelectorEventLoop):
    """A loop whose clock `skip` moves on: timers that are due by then run without a wait."""

    def __init__(self) -> None:
        self._skipped_s = 0.0
        super().__init__()

    def time(self) -> float:
        return super().time() + self._skipped_s

    def skip(self, seconds: float) -> None:
        self._skipped_s += seconds


def on_skipping_loop(test: AsyncTest[Parameters]) -> Test[Parameters]:
    """Runs an async test on a `SkippingLoop` of its own."""

    @functools.wraps(test)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        loop = SkippingLoop()
        try:
            loop.run_until_complete(test(*args, **kwargs))
        finally:
            loop.close()

    return run


def skip_time(seconds: float) -> None:
    """Moves the clock of the running `SkippingLoop` on."""
    cast("SkippingLoop", asyncio.get_running_loop()).skip(seconds)
