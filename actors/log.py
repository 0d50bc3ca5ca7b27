"""Logging of all processes: one JSON object a line, or coloured lines on a terminal."""

import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import Any

from weights.errors import GalaxylineError

LEVEL_VARIABLE = "GALAXYLINE_LOG_LEVEL"
WATCHED_VARIABLE = "GALAXYLINE_LOG_IS_WATCHED"
"""Set by a process that logs to a terminal for those that it starts, whose records come out there too."""

LEVELS = ("debug", "info", "warning", "error")


class LateLogger:
    """A logger of structlog's that imports it with the first record: that takes a tenth of a second, with rich."""

    def __init__(self, name: str) -> None:
        """The logger of the module `name`."""
        self._name = name

    def __getattr__(self, name: str) -> Any:
        """The method of structlog's logger."""
        import structlog  # noqa: PLC0415 - see the class

        return getattr(structlog.get_logger(self._name), name)


def configure_logging() -> None:
    """Sends structlog's and the standard library's records to stderr, in one format.

    The level is that of GALAXYLINE_LOG_LEVEL, "info" by default; raises GalaxylineError for any other. Fields bound
    with `structlog.contextvars` or `logger.bind` (stage, step_id, request_id) are part of every record.
    """
    import structlog  # noqa: PLC0415 - see LateLogger

    level = os.environ.get(LEVEL_VARIABLE, "info").lower()
    if level not in LEVELS:
        raise GalaxylineError(f"{LEVEL_VARIABLE} is {level!r}; choose one of {', '.join(LEVELS)}.")
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    is_watched = (sys.stderr is not None and sys.stderr.isatty()) or WATCHED_VARIABLE in os.environ
    if is_watched:
        os.environ[WATCHED_VARIABLE] = "1"
    last: list[structlog.typing.Processor] = (
        [structlog.dev.ConsoleRenderer()]
        if is_watched
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last]
        )
    )
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


def keep_logs_off_stdout() -> None:
    """Sends structlog's records to stderr unless structlog is configured already, and changes nothing else.

    It is for functions that other programs call: structlog would print to stdout, between their own output.
    """
    import structlog  # noqa: PLC0415 - see LateLogger

    if not structlog.is_configured():
        # Looked up anew for each record, so that a replaced sys.stderr is used.
        structlog.configure(logger_factory=lambda *_: structlog.PrintLogger(sys.stderr))


READ_BYTES = 1 << 16


class StderrRelay:
    """A pipe with a name, at `path`, whose text comes out at this process's stderr. Belongs to one event loop.

    Ray sends its workers' output to files of its own, which end with it.
    """

    def __init__(self, path: Path) -> None:
        """Makes the pipe. Call it on the event loop."""
        import asyncio  # noqa: PLC0415 - whoever calls this has it; commands that only log do without

        os.mkfifo(path, 0o600)
        self.path = path
        # For writing too, so that it never looks as if the last writer had gone.
        self._pipe = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._pipe, self._forward)

    def close(self) -> None:
        """Passes on what is left, and removes the pipe."""
        self._loop.remove_reader(self._pipe)
        self._forward()
        os.close(self._pipe)
        self.path.unlink(missing_ok=True)

    def _forward(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while text := os.read(self._pipe, READ_BYTES):
                sys.stderr.buffer.write(text)
                sys.stderr.flush()


def send_stderr_to(path: str) -> None:
    """Sends this process's stdout and stderr, also that of code that is not Python, to a `StderrRelay`'s pipe."""
    # Not for writing alone, which would wait for a reader that may have gone.
    pipe = os.open(path, os.O_RDWR | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(pipe, stream.fileno())
    os.close(pipe)
