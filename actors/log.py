"""Logging of all processes: one JSON object a line, or coloured lines where a person watches."""

import logging
import os
import sys

import structlog

from weights.errors import GalaxylineError

LEVEL_VARIABLE = "GALAXYLINE_LOG_LEVEL"
LEVELS = ("debug", "info", "warning", "error")


def configure_logging() -> None:
    """Sends structlog's and the standard library's records to stderr, in one format.

    The level is that of GALAXYLINE_LOG_LEVEL, "info" by default; raises GalaxylineError if it is none. Fields bound
    with `structlog.contextvars` or `logger.bind` (stage, step_id, request_id) are part of every record.
    """
    level = os.environ.get(LEVEL_VARIABLE, "info").lower()
    if level not in LEVELS:
        raise GalaxylineError(f"{LEVEL_VARIABLE} is {level!r}; choose one of {', '.join(LEVELS)}.")
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    is_watched = sys.stderr.isatty()
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
    """Sends structlog's records to stderr where nobody has said where they go, and leaves all else as it is.

    For functions that programs of others call: structlog would print to stdout, between what they print there.
    """
    if not structlog.is_configured():
        # Asked anew for each record, as whoever replaces sys.stderr means it.
        structlog.configure(logger_factory=lambda *_: structlog.PrintLogger(sys.stderr))
