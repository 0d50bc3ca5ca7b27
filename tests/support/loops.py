"""Tests on uvloop, which the sockets run on in earnest."""

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import ParamSpec

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
