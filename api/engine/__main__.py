"""`python -m api.engine`: the engine as a process of its own, so that tokenising never delays a step.

`EngineClient` starts it with the number of a socket's file descriptor; its options are the first frame on it, and the
messages of api/messages/engine.py follow. It ends when the socket or the pipeline does. It ignores SIGINT and SIGTERM,
which the front end handles: `ray job stop` sends them to every process, and the open requests are to end first.
"""

import asyncio
import logging
import math
import os
import pkgutil
import signal
import socket
import sys
from collections.abc import Awaitable

import msgspec
import structlog
import uvloop

from actors.log import configure_logging
from api.engine.engine import Engine
from api.engine.options import EngineOptions
from api.engine.signals import on_stop_signal
from api.errors import exit_code
from api.messages.engine import ToEngine
from api.messages.framing import Framing
from weights.errors import GalaxylineError

OPTIONS_TIMEOUT_S = 30.0
FLUSH_TIMEOUT_S = 5.0
EXIT_MARGIN_S = 5

log = structlog.get_logger()


class EngineProcess:
    """The life of the engine's process, from the first frame on its socket to the exit code."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._begun = asyncio.Event()
        self._stop = asyncio.Event()
        self._framing = Framing(self._begin)

    async def run(self, connection: socket.socket) -> int:
        """Serves the front end at the other end of `connection`; returns the exit code."""
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: self._framing, sock=connection)
        with on_stop_signal(lambda number: log.info("a signal is left to the front end", signal=number)):
            await _first_of(self._begun, self._framing.lost, timeout_s=OPTIONS_TIMEOUT_S)
            if self._engine is None:
                log.error("the front end is gone, or gave no options")
                return 1
            serving = asyncio.create_task(self._engine.run())
            serving.add_done_callback(lambda _: self._stop.set())
            await _first_of(self._stop, self._framing.lost)
            return await self._leave(self._engine, serving)

    async def _leave(self, engine: Engine, serving: "asyncio.Task[None]") -> int:
        serving.cancel()
        # Whatever hangs from here on, the alarm ends the process, and Ray's daemons end with it.
        signal.alarm(math.ceil(2 * engine.close_timeout_s) + EXIT_MARGIN_S)
        try:
            code = await _outcome(serving)
        finally:
            code_of_close = await _outcome(engine.close())
            self._framing.finish()
            await _first_of(self._framing.lost, timeout_s=FLUSH_TIMEOUT_S)
        return code or code_of_close

    def _begin(self, frame: memoryview) -> None:
        options = msgspec.msgpack.decode(frame, type=EngineOptions)
        engine = Engine(options, pkgutil.resolve_name(options.pipeline_start), self._framing.send)
        messages: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
        self._framing.on_frame = lambda later: engine.handle_message(messages.decode(later))
        self._engine = engine
        self._begun.set()


async def _first_of(*events: asyncio.Event, timeout_s: float | None = None) -> None:
    """Returns when one of the events is set, or after `timeout_s` seconds."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()


async def _outcome(ending: Awaitable[None]) -> int:
    """Waits for the end, and returns its exit code; an error is logged."""
    try:
        await ending
    except asyncio.CancelledError:
        return 0
    except GalaxylineError as error:
        log.error("the engine failed", kind=type(error).__name__, error=str(error))  # noqa: TRY400 - it says enough
        return exit_code(error)
    return 0


def main() -> None:
    """Runs the process, whose one argument is the number of the socket's file descriptor."""
    configure_logging()
    connection = socket.socket(fileno=int(sys.argv[1]))
    # A process that outlives this one must not hold the connection open.
    connection.set_inheritable(False)
    code = uvloop.run(EngineProcess().run(connection))
    logging.shutdown()
    # Without the handlers of Ray, and of threads that wait for it: where its head is gone they would wait for long.
    os._exit(code)


main()
