"""Tests on uvloop, which the sockets run on in earnest."""

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import ParamSpec

import uvloop

SECONDS_MAX = 60
Parameters = ParamSpec("Parameters")


def on_uvloop(test: Callable[Parameters, Coroutine[None, None, None]]) -> Callable[Parameters, None]:
    """Runs an async test on a uvloop loop of its own, for a minute at most."""

    @functools.wraps(test)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        async def bounded() -> None:
            await asyncio.wait_for(test(*args, **kwargs), SECONDS_MAX)

        uvloop.run(bounded())

    return run
