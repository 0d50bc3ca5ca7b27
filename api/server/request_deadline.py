"""Until when a request has to be answered."""

import asyncio
import math

from starlette.datastructures import Headers

from api.errors import DeadlineError, RequestError

TIMEOUT_HEADER = "x-request-timeout"
"""Seconds that a client gives its request, from its arrival to the end of the answer."""


class RequestDeadline:
    """A moment of the event loop's clock, or none; made when the request arrives."""

    def __init__(self, timeout_s: float | None) -> None:
        """It passes in `timeout_s` seconds; None: never."""
        self._timeout_s = timeout_s
        self._passes = math.inf if timeout_s is None else asyncio.get_running_loop().time() + timeout_s

    @classmethod
    def of(cls, headers: Headers, server_timeout_s: float | None) -> "RequestDeadline":
        """The smaller of what the client gives in its header and what the server gives.

        Raises RequestError where the header is no positive number of seconds.
        """
        given = headers.get(TIMEOUT_HEADER)
        timeouts = [timeout for timeout in (server_timeout_s, _seconds(given)) if timeout is not None]
        return cls(min(timeouts, default=None))

    @property
    def left_s(self) -> float | None:
        """Seconds until it passes, 0 from then on; None where it never does."""
        if self._timeout_s is None:
            return None
        return max(self._passes - asyncio.get_running_loop().time(), 0.0)

    def error(self) -> DeadlineError:
        """For a request whose time is up."""
        return DeadlineError(f"The request's {self._timeout_s:g} s are over: it was ended before it was complete.")

    def check(self) -> None:
        """Raises DeadlineError once it has passed."""
        if self.left_s == 0:
            raise self.error()


def _seconds(given: str | None) -> float | None:
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise RequestError(f"The header {TIMEOUT_HEADER} must be a positive number of seconds.", TIMEOUT_HEADER)
    return seconds
